"""The registry of methods, and a method from outside the package with trained weights of its own."""

from __future__ import annotations

import pytest
import tiny
import torch
from checks import PLAIN, assert_same_log, assert_same_weights, killed_and_resumed, trained_weights
from factory import save_tower

from llava_compodistill.hosts.llava.model import llava_core
from llava_compodistill.methods import METHODS, find_method

TOY = "toy_method:Toy"


def read_log(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


#: method -> the terms that it has beside L_LM (and L_KL), by stage.
MORE_TERMS = {
    "sft": {},
    "kd": {},
    "compodistill": {"dft": ["attention"]},
    "release": {"dpt": ["kl"], "dft": ["kl", "attention"]},
    "llava_kd": {stage: ["visual_kl", "relation"] for stage in ("dpt", "dft")},
    "llavadi": {"dft": ["features"]},
    "llava_mod": {},
    "align_kd": {stage: ["first_attention", "visual_features"] for stage in ("dpt", "dft")},
    "switch_kd": {"dft": ["align", "switch"]},
}


def test_every_method_is_known_by_its_name(tmp_path):
    from llava_compodistill.train.arguments import TrainingArguments

    assert METHODS.keys() == MORE_TERMS.keys()
    for name in METHODS:
        method = find_method(name)
        assert method.name == name
        for stage in ("pt", "dpt", "dft", "sft"):
            if stage in ("dpt", "dft") and method.teacher_stages and stage not in method.teacher_stages:
                with pytest.raises(ValueError, match=f"--stage {stage}: method {name} distils in the stages"):
                    TrainingArguments(str(tmp_path), stage=stage, method=name, use_cpu=True, report_to=[])
                continue
            args = TrainingArguments(str(tmp_path), stage=stage, method=name, use_cpu=True, report_to=[])
            terms = [term.name for term in method.terms(stage, args)]
            assert terms == ["answers", *MORE_TERMS[name].get(stage, [])]
            assert args.distilled == (stage in method.teacher_stages) and set(method.recipe) >= set(MORE_TERMS[name])
        assert set(method.teacher_stages) <= set(method.recipe)


@pytest.mark.parametrize(
    "name, message",
    [
        ("compo", "must be one of sft, kd, compodistill, .*, or package.module:Name"),
        ("no_such_module:Toy", "--method no_such_module:Toy: No module named 'no_such_module'"),
        ("toy_method:Tie", "has no attribute 'Tie'"),
        ("toy_method:FeatureTerm", "is no subclass of llava_compodistill.methods.Method"),
    ],
)
def test_a_method_that_is_none_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        find_method(name)


def test_methods_differ_in_their_terms_alone(dft):
    _, kd = dft("kd", method="kd", max_steps=1)
    _, alone = dft("without-vat", vat=False, max_steps=1)
    _, sft = dft("sft", method="sft", max_steps=1, teacher_model_path=None)
    assert kd == alone
    assert {"lm", "kl"} <= kd[0].keys() and "attention" not in kd[0]
    assert "kl" not in sft[0] and sft[0]["loss"] == pytest.approx(sft[0]["lm"], rel=1e-4)


@pytest.mark.invariant
def test_a_term_from_outside_trains_its_own_weights(dft):
    trainer, log = dft(method=TOY, max_steps=3, learning_rate=1e-2)
    module = llava_core(trainer.model).distillation["features"]
    assert module is trainer.objective.term("features").module
    fresh = torch.nn.init.normal_(
        torch.empty_like(module.weight), std=0.02, generator=torch.Generator().manual_seed(0)
    )
    assert (module.weight - fresh).abs().max() > 1e-3
    assert all(entry["loss"] == pytest.approx(entry["lm"] + 0.5 * entry["features"], rel=1e-4) for entry in log)
    assert log[-1]["features"] < log[0]["features"]


@pytest.mark.invariant
def test_a_term_from_outside_is_the_same_accumulated(dft):
    options = {**PLAIN, "method": TOY, "max_steps": 2}
    whole, expected = dft("whole", per_device_train_batch_size=4, **options)
    parts, found = dft("parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["features"] == pytest.approx(theirs["features"], rel=1e-4)
    assert_same_log(found, expected, 2e-4)
    assert_same_weights(trained_weights(parts.model), trained_weights(whole.model), 2e-5)


@pytest.mark.invariant
def test_a_term_from_outside_is_the_same_under_gradient_checkpointing(dft):
    options = {**PLAIN, "method": TOY, "max_steps": 2}
    plain, expected = dft("plain", **options)
    saving, found = dft("saving", gradient_checkpointing=True, **options)
    assert [entry["features"] for entry in found] == pytest.approx([entry["features"] for entry in expected], rel=1e-4)
    assert_same_weights(trained_weights(saving.model), trained_weights(plain.model), 1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_its_weights_are_kept_for_resuming_and_stay_out_of_llavas_files(dft, tmp_path, monkeypatch, lora):
    options = {"method": TOY, "max_steps": 4, **({"lora_enable": True, "lora_r": 4} if lora else {})}
    unbroken, expected = dft("unbroken", **options)
    resumed, _ = killed_and_resumed(dft, monkeypatch, **options)
    assert_same_log(read_log(resumed), expected, 1e-5)
    assert_same_weights(trained_weights(resumed.model), trained_weights(unbroken.model), 1e-5)
    saved = torch.load(tmp_path / "broken" / "distillation.bin", weights_only=True)
    weight = llava_core(resumed.model).distillation["features"].weight
    assert torch.equal(saved["features.weight"], weight)
    from llava_compodistill.hosts.llava.loader import load_model

    base = str(tmp_path / "broken")
    model = load_model(base)
    assert not any("distillation" in name for name in model.state_dict())


@pytest.mark.once
@pytest.mark.invariant
@pytest.mark.long
def test_two_processes_train_a_terms_weights_alike(ranks, dft, world, sharp_teacher, mixed, tmp_path):
    from test_distributed import parallel_flags

    # With gradient checkpointing every weight has to be met in every step; a quarter of the samples are text alone.
    options = {"max_steps": 3, "method": TOY, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
    single, expected = dft("one", gradient_accumulation_steps=2, **PLAIN, **options)
    flags = parallel_flags(world, sharp_teacher, mixed, tmp_path / "two", ddp_backend="gloo", **options)
    ranks.train_well(flags, 2, tmp_path / "log")
    found = tiny.read_log(tmp_path / "two")
    assert_same_log(found, expected, 2e-5)
    saved = torch.load(tmp_path / "two" / "distillation.bin", weights_only=True)
    weight = llava_core(single.model).distillation["features"].weight.detach()
    torch.testing.assert_close(saved["features.weight"], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "llavadi", "vision_tower": "other"}, r"\(9 and 4 an image\): L_feat compares hidden states"),
        ({"method": "llava_kd", "vision_tower": "other"}, r"\(9 and 4 an image\): .* compares"),
        ({"mm_projector_type": "taf", "vision_tower": "other"}, "TAF fetches the teacher's adapter"),
        ({"student_layers": "all", "teacher_layers": "2,3"}, "student band .* has 4 and the teacher band .* has 2"),
        ({"student_layers": "3,9"}, r"layers \[3, 9\] are outside a model with 4 layers"),
        ({"method": "switch_kd"}, "student's encoder is frozen: .* --unfreeze_mm_vision_tower True, or leave"),
        (
            {"method": "switch_kd", "unfreeze_mm_vision_tower": True, "vision_tower": "other"},
            r"\(9 and 4 an image\): align compares answers",
        ),
        ({"method": "llavadi", "method_options": '{"map": "deep"}'}, "map: must be one of mlp, linear, got 'deep'"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_before_anything_is_loaded(dft, tmp_path, monkeypatch, options, message):
    from llava_compodistill.train import run

    def loaded(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr(run, "load_teacher", loaded)
    monkeypatch.setattr(run, "build_student", loaded)
    if options.get("vision_tower") == "other":
        options = {**options, "vision_tower": save_tower(tmp_path / "siglip-other", patches=4, pixels=42)}
    with pytest.raises(ValueError, match=message):
        dft(**options)
    with pytest.raises(AssertionError, match="weights are read"):
        dft()
