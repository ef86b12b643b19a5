"""What on-policy distillation (`--on_policy`, see `own_answers`) does not go with, said before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..hosts.llava.templates import current_template, end_token

if TYPE_CHECKING:
    from .arguments import TrainingArguments


def check_on_policy(args: TrainingArguments) -> None:
    """Check the flags of on-policy distillation against each other, before anything is loaded.

    Raises:
        ValueError: naming the flag, its value and the way out.
    """
    flag = f"--on_policy {args.on_policy:g}"
    if not 0 <= args.on_policy <= 1:
        raise ValueError(f"{flag}: must be a share of the samples, from 0 to 1.")
    if args.on_policy_temperature < 0:
        raise ValueError(f"--on_policy_temperature {args.on_policy_temperature:g}: cannot be negative (0 is greedy).")
    if args.on_policy_max_tokens < 1:
        raise ValueError(f"--on_policy_max_tokens {args.on_policy_max_tokens}: must be at least 1.")
    if not args.on_policy:
        for name in ("on_policy_temperature", "on_policy_max_tokens"):
            if getattr(args, name) != getattr(type(args), name):
                raise ValueError(
                    f"--{name} {getattr(args, name):g}: the student answers no sample. Add --on_policy, or leave the "
                    "flag out."
                )
        return
    if not args.chosen_method.on_policy:
        raise ValueError(f"{flag}: not with --method {args.method}; use kd or compodistill, or leave the flag out.")
    if not args.distilled or args.tune_mm_mlp_adapter:
        why = "no teacher judges the student's answers" if not args.distilled else "it trains the adapter, on captions"
        raise ValueError(f"{flag}: not in --stage {args.stage}, where {why}. Leave the flag out in this stage.")
    judged = args.stage in args.chosen_method.teacher_stages and args.kl_weight > 0
    if not (judged or args.chosen_method.aligns(args.stage, args)):
        raise ValueError(
            f"{flag}: without L_KL and L_ADL nothing is learned from the student's own answers. Give --kl_weight or "
            "--attention_weight a value above 0, or leave the flag out."
        )
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if args.fsdp or (deepspeed is not None and deepspeed.is_zero3()):
        raise ValueError(f"{flag}: not with {'FSDP' if args.fsdp else 'ZeRO-3'}, {PARTITIONED}")


PARTITIONED = (
    "where every rank would have to take part in each token that another generates. Use DDP (torchrun), or ZeRO-2 "
    "(DEEPSPEED_CONFIG=zero2.json)."
)


def refuse_other_tokenizer(args: TrainingArguments, teacher_text: Any) -> None:
    """Refuse a teacher that reads with another tokenizer than the student's.

    Args:
        teacher_text: how it reads (`find_teacher_text`), None where it reads the student's tokens.

    Raises:
        ValueError: naming it.
    """
    if args.on_policy and teacher_text is not None:
        raise ValueError(
            f"--on_policy {args.on_policy:g}: the teacher's tokenizer ({teacher_text.tokenizer.name_or_path}) is not "
            "the student's, and it would have to read the tokens that the student generates. Use a teacher with the "
            "student's tokenizer, or leave the flag out."
        )


def find_end_token(tokenizer: Any) -> int:
    """The token at which an answer ends under the template in use.

    Raises:
        ValueError: when it has none.
    """
    end = end_token(tokenizer)
    if end is None:
        raise ValueError(
            f"--on_policy: under the template {current_template()!r} (--version) answers end with no token of their "
            "own, so the student's would not end. Use a template of conversations, such as qwen_1_5 or v1."
        )
    return end
