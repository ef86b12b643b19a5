"""What on-policy distillation does not go with is said by name, before weights are read."""

from __future__ import annotations

import json
import os

import pytest

from llava_compodistill.train.arguments import TrainingArguments

REFUSED = [
    ({"on_policy": 1.5}, "--on_policy 1.5: must be a share"),
    ({"on_policy": -0.1}, "--on_policy -0.1: must be a share"),
    ({"on_policy": 0.5, "on_policy_temperature": -1.0}, "--on_policy_temperature -1: cannot be negative"),
    ({"on_policy": 0.5, "on_policy_max_tokens": 0}, "--on_policy_max_tokens 0: must be at least 1"),
    ({"on_policy_max_tokens": 64}, "--on_policy_max_tokens 64: the student answers no sample. Add --on_policy"),
    ({"on_policy_temperature": 0.0}, "--on_policy_temperature 0: the student answers no sample"),
    ({"on_policy": 0.5, "method": "llava_kd"}, "--on_policy 0.5: not with --method llava_kd; use kd or compodistill"),
    ({"on_policy": 0.5, "method": "release"}, "not with --method release"),
    ({"on_policy": 0.5, "method": "toy_method:Toy"}, "not with --method toy_method:Toy"),
    ({"on_policy": 0.5, "stage": "sft"}, "--on_policy 0.5: not in --stage sft, where no teacher judges"),
    ({"on_policy": 0.5, "stage": "pt"}, "not in --stage pt, where no teacher judges"),
    ({"on_policy": 0.5, "stage": "dpt"}, "not in --stage dpt, where it trains the adapter, on captions"),
    ({"on_policy": 0.5, "kl_weight": 0.0, "vat": False}, "without L_KL and L_ADL nothing is learned"),
    ({"on_policy": 0.5, "kl_weight": 0.0, "method": "kd"}, "without L_KL and L_ADL nothing is learned"),
]


@pytest.mark.once
@pytest.mark.parametrize("options, message", REFUSED)
def test_flags_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)


@pytest.mark.once
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "kd"},
        {"kl_weight": 0.0},
        {"vat": False},
        {"stage": "sft", "attention_stages": "dft,sft"},
        {"on_policy_temperature": 0.0, "on_policy_max_tokens": 1},
    ],
)
def test_flags_that_do(tmp_path, options):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], on_policy=1.0, **options)
    assert args.on_policy == 1.0


@pytest.fixture
def own_environment():
    """transformers tells accelerate by it what a run's arguments ask for."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_fsdp_and_zero3_are_refused(tmp_path, own_environment):
    options = {"use_cpu": True, "report_to": [], "on_policy": 0.5}
    with pytest.raises(ValueError, match=r"--on_policy 0.5: not with FSDP, .* Use DDP \(torchrun\), or ZeRO-2"):
        TrainingArguments(str(tmp_path), fsdp="full_shard", **options)
    pytest.importorskip("deepspeed")
    from transformers.integrations import deepspeed

    auto = {
        name: "auto" for name in ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    }
    try:
        for stage in (2, 3):
            path = tmp_path / f"zero{stage}.json"
            path.write_text(json.dumps({**auto, "zero_optimization": {"stage": stage}}))
            if stage == 2:
                assert TrainingArguments(str(tmp_path), deepspeed=str(path), **options).on_policy == 0.5
                continue
            with pytest.raises(ValueError, match="--on_policy 0.5: not with ZeRO-3, where every rank"):
                TrainingArguments(str(tmp_path), deepspeed=str(path), **options)
    finally:
        deepspeed.unset_hf_deepspeed_config()


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights is an error."""
    from llava_compodistill.train import run

    def loaded(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr(run, "load_teacher", loaded)
    monkeypatch.setattr(run, "build_student", loaded)


def test_a_template_whose_answers_have_no_end_token(dft, no_weights):
    with pytest.raises(ValueError, match="--on_policy: under the template 'plain' .* no token of their own"):
        dft(on_policy=0.5, version="plain")
    with pytest.raises(AssertionError, match="weights are read"):
        dft(on_policy=0.5, version="qwen_base")


def test_a_teacher_with_another_tokenizer(dft, no_weights, siglip, tmp_path):
    from factory import checkpoint_folder, make_llama_tokenizer, make_model

    tokenizer = make_llama_tokenizer(tmp_path / "tokenizer")
    model = make_model(siglip, "llama", vocab=512)
    teacher = checkpoint_folder(tmp_path / "llava-other", model, tokenizer)
    options = {"teacher_model_path": teacher, "teacher_version": "v1", "method": "kd"}
    with pytest.raises(ValueError, match=f"--on_policy 0.5: the teacher's tokenizer .*{teacher.name}.* is not the"):
        dft(on_policy=0.5, **options)
    with pytest.raises(AssertionError, match="weights are read"):
        dft(**options)


def test_a_trainer_made_by_hand_is_refused_it_too(dft, monkeypatch):
    from types import SimpleNamespace

    from llava_compodistill.train import run
    from llava_compodistill.train.trainer import CompoDistillTrainer

    other = SimpleNamespace(tokenizer=SimpleNamespace(name_or_path="another"))
    monkeypatch.setattr(
        run, "CompoDistillTrainer", lambda **values: CompoDistillTrainer(**{**values, "teacher_text": other})
    )
    with pytest.raises(ValueError, match="the teacher's tokenizer .another. is not the student's"):
        dft(on_policy=0.5)
