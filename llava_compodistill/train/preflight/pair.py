"""The models of a command: what their configs, tokenizers and folders say, without their weights."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ...hosts.llava.loader import add_marker_tokens, checkpoint_kind, has_weights, read_config, read_lora_config
from ...hosts.llava.model import count_visual_tokens, has_own_tower
from ...hosts.llava.taf import PROJECTOR_TYPE
from ...hosts.llava.templates import use_template
from ...methods.base import Term
from ...pair.placement import QUANTISED
from ...pair.student import add_lora, check_adapter_path, check_start, describe_taf, set_trainable, student_dtype
from ...pair.teacher import check_teacher
from ...pair.tokens import first_difference
from ...pair.vision import check_taf, same_tower
from .. import checkpoint
from ..cache.run import open_cache, said
from ..checks import ADAPTER_STAGES
from ..on_policy import find_end_token, refuse_other_tokenizer
from ..output import FINISHED, find_start
from ..rehearsal import ConfigOnly, check_image_layers, rehearse, sketch, sketch_student
from ..run import fetches_adapter, read_prepared_tokenizer
from ..teacher_text import TeacherText, find_teacher_text
from .findings import NOTE, STOPS, Findings
from .flags import Parsed

#: What the language model's folder of a stage usually holds.
USUAL = {"pt": "base", "dpt": "base", "dft": "base", "sft": "full"}


@dataclass
class Models:
    """What is known of the models of a command.

    Attributes:
        tokenizer: the student's, prepared as in training; None where it cannot be read.
        template: the conversation template in force.
        student, teacher: without weights; None where they cannot be told.
        terms: of the stage, prepared on the pair.
        shared: the tokens that both models have.
        rows: (what, student's, teacher's, what follows) for the report.
    """

    tokenizer: Any = None
    template: Any = None
    student: ConfigOnly | None = None
    teacher: ConfigOnly | None = None
    teacher_text: TeacherText | None = None
    shared: int | None = None
    terms: list[Term] = field(default_factory=list)
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def aligned_layers(self) -> list[dict[str, Any]]:
        """{"term", "student", "groups", "measured"} of each term that aligns layers."""
        return [
            {
                "term": term.name,
                "student": list(term.student_layers),
                "groups": [list(group) for group in term.groups],
                "measured": term.calibrated_by,
            }
            for term in self.terms
            if getattr(term, "student_layers", None) and getattr(term, "groups", None)
        ]


def look_at_models(parsed: Parsed, findings: Findings, without_weights: bool) -> Models:
    """Go the way of `train.run.main`, without weights, and note what would stop it.

    Args:
        without_weights: whether folders of configs may stand for the models.
    """
    model_args, args = parsed.model, parsed.training
    found = Models()
    with findings.stopping("the template"):
        found.template = use_template(model_args.version)
    student_kind = _look_at_folder("student", model_args.model_name_or_path, findings, without_weights)
    if student_kind not in (None, "no weights"):
        with findings.stopping("the student"):
            check_start(model_args, args)
    if found.template is not None:
        with findings.stopping("the student's tokenizer"):
            found.tokenizer = read_prepared_tokenizer(model_args.model_name_or_path, args, found.template)
    with findings.stopping("the student"):
        found.student = sketch_student(model_args)
        check_image_layers(model_args, args)
    if found.student is not None:
        _look_at_tower(found.student.config, findings, without_weights)
    wants_teacher = args.distilled or fetches_adapter(model_args, args)
    teacher_kind = None
    if wants_teacher:
        teacher_kind = _look_at_teacher(found, parsed, findings, without_weights)
    _look_at_towers(found, wants_teacher)
    with findings.stopping("the pair"):
        _look_at_pair(found, parsed)
    if found.student is not None:
        _look_at_adapter(found, parsed, findings)
        _look_at_disk(found, parsed, findings)
    usual = USUAL.get(args.stage)
    follows = "" if usual is None else f"usual in {args.stage}: {usual}"
    if usual in ("base", "full") and student_kind == "lora" or student_kind == "full":
        follows = "goes on from that checkpoint"
    found.rows.insert(0, ("checkpoint", student_kind or "hub name", teacher_kind or "", follows))
    return found


def _look_at_folder(whose: str, path: str, findings: Findings, without_weights: bool) -> str | None:
    """The kind of checkpoint in a folder; None for a hub name."""
    if not os.path.isdir(path):
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            findings.add(STOPS, f"no such folder: the {whose}, {path}", remedy="correct the path")
        return None
    if os.path.isfile(os.path.join(path, "config.json")) and not has_weights(path):
        if not os.path.isfile(os.path.join(path, checkpoint.ADAPTER_FILE)):
            findings.add(NOTE if without_weights else STOPS, f"weights: not here: of the {whose}, {path}")
            return "no weights"
    with findings.stopping(f"the {whose}"):
        return checkpoint_kind(path)
    return None


def _look_at_tower(config: Any, findings: Findings, without_weights: bool) -> None:
    path = config.mm_vision_tower
    if os.path.isdir(path) and not has_weights(path) and not has_own_tower(config):
        findings.add(NOTE if without_weights else STOPS, f"weights: not here: of the vision tower, {path}")


def _look_at_teacher(found: Models, parsed: Parsed, findings: Findings, without_weights: bool) -> str | None:
    model_args, args = parsed.model, parsed.training
    path = model_args.teacher_model_path
    without_weights = without_weights or model_args.teacher_cache is not None  # which stands for them
    kind = _look_at_folder("teacher", path, findings, without_weights)
    if kind not in (None, "no weights"):
        with findings.stopping("the teacher"):
            check_teacher(path)
    if kind in ("lora", "adapter") and model_args.teacher_model_base is None:
        base = read_lora_config(path).get("base_model_name_or_path") if kind == "lora" else None
        if base is None:
            text = f"the teacher: {path} holds {'a LoRA' if kind == 'lora' else 'an adapter'} only"
            findings.add(
                NOTE if model_args.teacher_cache else STOPS,
                text,
                remedy="name its language model with --teacher_model_base",
            )
    with findings.stopping("the teacher"):
        config = read_config(path)
        if getattr(config, "mm_vision_tower", None) is None:
            raise ValueError(
                f"--teacher_model_path {path} is a language model without vision: give a LLaVA checkpoint."
            )
        found.teacher = sketch(config, path, model_args)
    if found.tokenizer is None or not args.distilled:
        return kind
    shared = None
    with findings.stopping("the teacher's tokenizer"):
        if args.on_policy:
            find_end_token(found.tokenizer)
        found.teacher_text, shared = find_teacher_text(found.tokenizer, model_args, args)
        refuse_other_tokenizer(args, found.teacher_text)
    text, found.shared = found.teacher_text, shared
    if text is not None:
        token = first_difference(found.tokenizer, text.tokenizer)
        reads = f"unlike (the first token apart: {token!r}); the teacher reads under {text.template}"
        found.rows.append(("tokenizer", f"{len(found.tokenizer)} tokens", f"{len(text.tokenizer)} tokens", reads))
    elif shared is not None:
        found.rows.append(("tokenizer", f"{len(found.tokenizer)} tokens", "", f"shared, {shared} tokens in common"))
    return kind


def _look_at_towers(found: Models, wants_teacher: bool) -> None:
    """Tokenizer, template and towers as rows."""
    if found.student is None:
        return
    sizes = [found.student.config.vocab_size, found.teacher.config.vocab_size if found.teacher else ""]
    if found.tokenizer is not None:
        add_marker_tokens(found.student.config, found.tokenizer)
        grows = len(found.tokenizer) > sizes[0]
        follows = f"the student's grows to {len(found.tokenizer)}" if grows else ""
        found.rows.append(("vocabulary (config)", str(sizes[0]), str(sizes[1]), follows))
        special = ", ".join(f"{name} {getattr(found.tokenizer, f'{name}_token')!r}" for name in ("bos", "eos", "pad"))
        found.rows.append(("special tokens", special, "", f"under the template {found.template.version}"))
    patches = [count_visual_tokens(model) for model in (found.student, found.teacher) if model is not None]
    follows = ""
    if found.teacher is not None:
        alike = same_tower(found.student.config, found.teacher.config)
        follows = "the same: images are encoded once" if alike else "not the same: each model encodes the images"
        if len(set(patches)) > 1:
            follows += f"; attention maps are resampled from {patches[1]} to {patches[0]}"
    towers = [
        f"{model.config.mm_vision_tower} (layer {model.config.mm_vision_select_layer})" if model else ""
        for model in (found.student, found.teacher)
    ]
    found.rows.append(("vision tower", *towers, follows))
    found.rows.append(("visual tokens an image", *(str(count) for count in [*patches, ""][:2]), ""))


def _look_at_pair(found: Models, parsed: Parsed) -> None:
    model_args, args = parsed.model, parsed.training
    if found.student is None or found.teacher is None:
        return
    if fetches_adapter(model_args, args):
        check_taf(found.student.config, found.teacher.config)
    found.terms = rehearse(model_args, args, found.teacher_text)
    names = ", ".join(dict.fromkeys(term.name for term in found.terms))
    if names:
        found.rows.append(("loss terms", names, "", f"--method {args.method}, --stage {args.stage}"))
    if model_args.teacher_cache and names and found.tokenizer is not None:
        texts = found.tokenizer, found.teacher_text, found.shared
        _, cache = open_cache(model_args, parsed.data, args, found.terms, *texts)
        found.rows.append(("teacher cache", "", said(cache.what), model_args.teacher_cache))


def _look_at_adapter(found: Models, parsed: Parsed, findings: Findings) -> None:
    """Complete the student's config with its adapter, and compare it with the one that is to be loaded."""
    model_args, args = parsed.model, parsed.training
    config = found.student.config
    path = model_args.pretrain_mm_mlp_adapter
    new = getattr(read_config(model_args.model_name_or_path), "mm_vision_tower", None) is None
    with findings.stopping("the adapter"):
        if new and config.mm_projector_type == PROJECTOR_TYPE:
            describe_taf(config, model_args, None if found.teacher is None else found.teacher.config)
        if path:
            check_adapter_path(path)
    kind = config.mm_projector_type
    origin = "goes on from the checkpoint's"
    if new:
        origin = f"from {path}" if path else "new"
    if new and not path and args.stage not in ADAPTER_STAGES:
        findings.add(
            NOTE, f"an adapter that starts from random weights: --stage {args.stage}",
            remedy="--pretrain_mm_mlp_adapter names the mm_projector.bin of the stage before",
        )  # fmt: skip
    teachers = getattr(found.teacher.config, "mm_projector_type", "linear") if found.teacher else ""
    found.rows.append(("adapter", kind, teachers, origin))
    if not path or os.path.isdir(path):
        return
    if not os.path.isfile(path):
        findings.add(
            STOPS,
            f"no such file: --pretrain_mm_mlp_adapter {path}",
            remedy="run the stage before, or correct the path",
        )
        return
    beside = os.path.join(os.path.dirname(path), "config.json")
    if os.path.isfile(beside):
        with open(beside, encoding="utf-8") as file, contextlib.suppress(ValueError):
            made = json.load(file)
            names = ("mm_projector_type", "hidden_size", "taf_teacher_hidden_size", "taf_teacher_projector_type")
            apart = [
                f"{name} {made[name]!r} there, {getattr(config, name)!r} here"
                for name in names
                if made.get(name) is not None and getattr(config, name, None) not in (None, made[name])
            ]
            if apart:
                text = f"an adapter of another pair: {path}, {'; '.join(apart)}"
                findings.add(STOPS, text, remedy="give the adapter that was trained for this student and teacher")


def _look_at_disk(found: Models, parsed: Parsed, findings: Findings) -> None:
    args = parsed.training
    if not parsed.has_output or args.made_with is None:
        return
    with findings.stopping("an earlier run in --output_dir"):
        # How many processes there will be is not known here.
        made_with = {name: value for name, value in args.made_with.items() if name != "global_batch"}
        start = find_start(args, made_with)
        if start is FINISHED:
            findings.add(
                NOTE, f"a finished run: {args.output_dir} holds the result of this command; nothing is trained"
            )
        elif start is not None:
            findings.add(NOTE, f"an earlier run in --output_dir: training goes on from {start}")
    with findings.stopping("disk space"):
        width = found.student.get_vision_tower().hidden_size
        checkpoint.check_disk_space(skeleton(found.student.config, width, parsed), args)


def skeleton(config: Any, encoder_width: int, parsed: Parsed) -> torch.nn.Module:
    """A student with the shapes and precisions of a stage, and no memory for its weights; without its encoder's."""
    from ...hosts.llava.language_models import model_class

    model_args, args = parsed.model, parsed.training
    cls = model_class(config.model_type)
    values = config.to_dict()
    values.pop("model_type", None)
    values.setdefault("mm_hidden_size", encoder_width)
    with _default_dtype(student_dtype(args)), torch.device("meta"):
        model = cls(cls.config_class(**values))
        if args.chosen_method.changes_student(args.stage):
            args.chosen_method.change_student(model, args.stage)
        if args.lora_enable:
            model = add_lora(model, args)
    set_trainable(
        model,
        args.stage,
        freeze_backbone=model_args.freeze_backbone,
        freeze_adapter=args.freeze_mm_mlp_adapter,
        trained=lambda name: args.chosen_method.trained(args.stage, name),
    )
    if not args.deepspeed:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_packages(parsed: Parsed, findings: Findings) -> None:
    """Packages that flags ask for."""
    model_args, args = parsed.model, parsed.training
    reported = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    quantised = f"--bits {args.bits}" if args.bits in (4, 8) else f"--teacher_placement {args.teacher_placement}"
    needed = {
        "flash_attn": (model_args.attn_implementation == "flash_attention_2", "--attn_implementation", "flash"),
        "deepspeed": (bool(args.deepspeed), "--deepspeed", "deepspeed"),
        "bitsandbytes": (args.bits in (4, 8) or args.teacher_placement in QUANTISED, quantised, "quant"),
        "tensorboard": ("tensorboard" in reported, "--report_to tensorboard", "tensorboard"),
        "wandb": ("wandb" in reported, "--report_to wandb", "wandb"),
        "triton": (args.attention_map_impl == "triton", "--attention_map_impl triton", None),
    }
    for name, (wanted, flag, extra) in needed.items():
        if wanted and importlib.util.find_spec(name) is None:
            way = f"pip install 'llava-compodistill[{extra}]'" if extra else f"pip install {name}"
            findings.add(STOPS, f"a package is missing: {name}, for {flag}", remedy=way)
    config = args.deepspeed
    if isinstance(config, str) and not os.path.isfile(config):
        findings.add(STOPS, f"no such file: --deepspeed {config}", remedy="correct the path")
