"""LLaVA-MoD: preferences against their formulas, and the whole recipe from dense student to sparse one."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from checks import assert_same_weights, trained_weights
from factory import make_batch, make_model

from llava_compodistill.errors import DataError
from llava_compodistill.hosts.llava.experts import Experts
from llava_compodistill.hosts.llava.language_models import upcycle
from llava_compodistill.losses.preference import preference_loss
from llava_compodistill.methods import find_method
from llava_compodistill.record.forward import Needs, record
from llava_compodistill.record.merge import record_merge
from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.data import last_answer
from llava_compodistill.train.objective import Objective


# ---------------------------------------------------------------------------------------------------------------------
# Preferences
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["dpo", "kto_pair"])
def test_preference_losses_by_hand(kind):
    chosen, rejected, beta = [0.7, -2.0, 3.0], [-1.0, 0.4, 2.0], 0.3
    losses = preference_loss(torch.tensor(chosen), torch.tensor(rejected), kind, beta)

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    if kind == "dpo":
        expected = [-math.log(sigma(beta * (c - r))) for c, r in zip(chosen, rejected, strict=True)]
    else:
        up, low = max(0, sum(chosen) / 3), max(0, sum(rejected) / 3)
        ones = [1 - sigma(beta * (c - low)) for c in chosen]
        others = [1 - sigma(beta * (up - r)) for r in rejected]
        expected = [(one + other) / 2 for one, other in zip(ones, others, strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "kto_pair"])
def test_the_preference_step_against_whole_logits(siglip, tmp_path, kind):
    teacher = make_model(siglip, hidden=48, layers=6, heads=6, vocab=128, seed=1, dtype=torch.float32)
    student = make_model(siglip, seed=2, dtype=torch.float32)
    upcycle(student, Experts((0, 2)))
    args = TrainingArguments(
        str(tmp_path), stage="preference", method="llava_mod", use_cpu=True, report_to=[],
        method_options=json.dumps({"preference": kind, "beta": 0.5}),
    )  # fmt: skip
    objective = Objective(student, teacher.requires_grad_(False), args.chosen_method.terms("preference", args), 91)
    batch = make_batch(["qIqaa", "qqa", "qIqaaa", "qqaa"], dtype=torch.float32)  # two pairs, one of text alone

    def likelihoods(model):
        with record_merge(model) as recorder:
            logits = model(**batch.inputs, use_cache=False).logits.log_softmax(-1)
        labels = recorder.batch.labels
        return torch.stack(
            [
                sum(logits[b, n - 1, labels[b, n]] for n in range(labels.shape[1]) if labels[b, n] != -100)
                for b in range(4)
            ]
        )

    with objective.running():
        sums = objective(student, {**batch.inputs, "use_cache": False})
    with record(student, Needs(routing=True)) as recorder:
        student(**batch.inputs, use_cache=False)
    ratios = likelihoods(student) - likelihoods(teacher).detach()
    expected = preference_loss(ratios[:2], ratios[2:], kind, 0.5).mean()
    # Both are sums that are divided by four samples.
    assert float(sums["preference"].loss) / 4 == pytest.approx(float(expected), rel=1e-4)
    balance = sum(routing.balance.mean() for routing in recorder.latest.routing.values())
    assert float(sums["balance"].loss) / 4 == pytest.approx(float(balance), rel=1e-5)
    assert objective.term("balance").weight == 0.02
    margin, pairs = sums["preference"].measured["reward_margin"]
    assert int(pairs) == 2 and float(margin) == pytest.approx(0.5 * float((ratios[:2] - ratios[2:]).sum()), rel=1e-3)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(sums["preference"].loss / 4, trained, allow_unused=True)
    wanted = torch.autograd.grad(expected, trained, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-3)


@pytest.mark.parametrize("kind, expected", [("dpo", math.log(2)), ("kto_pair", 0.5)])
def test_identical_models_prefer_nothing(siglip, tmp_path, kind, expected):
    teacher = make_model(siglip, seed=1, dtype=torch.float32).requires_grad_(False)
    term = find_method("llava_mod", {"preference": kind}).terms("preference", None)[0]
    objective = Objective(make_model(siglip, seed=1, dtype=torch.float32), teacher, [term], 91)
    with objective.running():
        batch = make_batch(["qIqaa", "qqa", "qIqaaa", "qqaa"], dtype=torch.float32)
        sums = objective(objective.pair.student, {**batch.inputs, "use_cache": False})["preference"]
    margin, pairs = sums.measured["reward_margin"]
    assert abs(margin.item()) < 1e-5 and pairs.item() == 2
    assert sums.loss.item() / 4 == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The recipe
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pairs(mixed, tmp_path_factory):
    """The mixed samples, each with a rejected answer."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    path.write_text(json.dumps([{**sample, "rejected": "blue"} for sample in json.loads(mixed.read_text())]))
    return path


@pytest.fixture(scope="module")
def recipe(world, sharp_teacher, mixed, pairs, tmp_path_factory):
    """{stage: its trainer}, and the folder that they are in."""
    root = tmp_path_factory.mktemp("llava-mod")
    options = {"method": "llava_mod", "mm_projector_type": "mlp2x_gelu"}
    distilled = {**options, "teacher_model_path": sharp_teacher, "data_path": mixed}
    adapter = root / "pt" / "mm_projector.bin"
    found = {"pt": tiny.run(world, "pt", root / "pt", **options)}
    found["d2d"] = tiny.run(
        world, "d2d", root / "d2d", version="qwen_1_5", pretrain_mm_mlp_adapter=adapter, **distilled
    )
    found["d2s"] = tiny.run(
        world, "d2s", root / "d2s", model_name_or_path=root / "d2d", gradient_checkpointing=True,
        save_strategy="steps", save_steps=1, **distilled,
    )  # fmt: skip
    preference = {**distilled, "data_path": pairs, "model_name_or_path": root / "d2s"}
    found["preference"] = tiny.run(world, "preference", root / "preference", sight_steps=1, **preference)
    return found, root


def test_each_step_has_its_terms(recipe):
    trainers, root = recipe
    logs = {stage: tiny.read_log(root / stage)[-1] for stage in trainers}
    assert logs["pt"]["loss"] == pytest.approx(logs["pt"]["lm"], rel=1e-4)
    assert logs["d2d"]["loss"] == pytest.approx(logs["d2d"]["kl"], rel=1e-4)
    d2s = logs["d2s"]
    assert d2s["loss"] == pytest.approx(d2s["lm"] + d2s["kl"] + 0.01 * d2s["balance"], rel=1e-3)
    last = logs["preference"]
    assert last["loss"] == pytest.approx(last["preference"] + 0.02 * last["balance"], rel=1e-3)
    assert {"reward_margin", "reward_accuracy", "dropped", "sight"} <= last.keys() and "lm" not in last


@pytest.mark.invariant
def test_the_sparse_steps_train_experts_and_adapter_alone(recipe):
    trainers, root = recipe
    for stage in ("d2s", "preference"):
        names = {name for name, p in trainers[stage].model.named_parameters() if p.requires_grad}
        assert {name.split(".")[1] for name in names} == {"layers", "mm_projector"}
        assert all(".mlp." in name or "mm_projector" in name for name in names)
    before, after = (load(root / stage) for stage in ("d2d", "preference"))
    for name, value in before.items():
        frozen = ".mlp." not in name and "mm_projector" not in name
        assert name not in after or torch.equal(value, after[name]) == frozen, name
    copies = [after[f"model.layers.2.mlp.experts.{number}.up_proj.weight"] for number in range(4)]
    assert sum(not torch.equal(copy, before["model.layers.2.mlp.up_proj.weight"]) for copy in copies) > 1


def load(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_llava_loads_the_sparse_student(recipe, world):
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    trainers, root = recipe
    config = json.loads((root / "preference" / "config.json").read_text())
    assert config["model_type"] == "llava_qwen2_sparse" and config["architectures"] == ["LlavaQwen2SparseForCausalLM"]
    assert config["experts"] == {"layers": [0, 2], "count": 4, "choices": 2, "capacity_factor": 1.5}
    assert config["compodistill"]["stage"] == "preference" and config["compodistill"]["template"] == "qwen_1_5"
    path = str(root / "preference")
    _, model, _, _ = load_pretrained_model(path, None, get_model_name_from_path(path), device="cpu", device_map="cpu")
    student = trainers["preference"].model.eval()
    inputs = make_batch(["qIqq"], dtype=torch.float32).inputs
    inputs["images"] = torch.rand(1, 3, *[student.get_vision_tower().config.image_size] * 2)
    with torch.no_grad():
        expected = student(**inputs).logits
        torch.testing.assert_close(model.float()(**inputs).logits, expected, atol=1e-4, rtol=1e-3)
        answer = model.generate(inputs["input_ids"], images=inputs["images"], max_new_tokens=3, do_sample=False)
    assert answer.shape[1] >= 1


@pytest.mark.invariant
def test_the_sparse_step_resumed_is_the_step_unbroken(recipe, world, sharp_teacher, mixed, tmp_path, monkeypatch):
    trainers, root = recipe
    (tmp_path / "d2s").mkdir()
    (root / "d2s" / "checkpoint-1").rename(tmp_path / "d2s" / "checkpoint-1")
    resumed = tiny.run(
        world, "d2s", tmp_path / "d2s", method="llava_mod", mm_projector_type="mlp2x_gelu", data_path=mixed,
        teacher_model_path=sharp_teacher, model_name_or_path=root / "d2d", gradient_checkpointing=True,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    assert_same_weights(trained_weights(resumed.model), trained_weights(trainers["d2s"].model), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------
def test_what_the_stages_cannot_start_from(world, sharp_teacher, mixed, pairs, tmp_path, recipe):
    options = {"method": "llava_mod", "mm_projector_type": "mlp2x_gelu", "teacher_model_path": sharp_teacher}
    with pytest.raises(ValueError, match="--stage preference trains a sparse student, and this one is dense"):
        tiny.run(world, "preference", tmp_path / "a", data_path=pairs, **options)
    for stage in ("d2d", "d2s"):
        with pytest.raises(ValueError, match=f"--stage {stage} of llava_mod .* leave --lora_enable out"):
            tiny.run(world, stage, tmp_path / "b", data_path=mixed, lora_enable=True, **options)
    with pytest.raises(ValueError, match="--stage dft: method llava_mod distils in the stages d2d, d2s, preference"):
        tiny.run(world, "dft", tmp_path / "b", data_path=mixed, **options)
    with pytest.raises(ValueError, match="other experts .* than the options ask for"):
        sparse = {**options, "model_name_or_path": recipe[1] / "d2s", "method_options": '{"experts": 3}'}
        tiny.run(world, "d2s", tmp_path / "b", data_path=mixed, **sparse)
    with pytest.raises(ValueError, match="--stage 'd2d': must be one of pt, dpt, dft, sft \\(--method kd\\)"):
        tiny.run(world, "d2d", tmp_path / "c", data_path=mixed, **{**options, "method": "kd"})
    with pytest.raises(DataError, match="16 x no rejected answer"):
        tiny.run(world, "preference", tmp_path / "d", data_path=mixed, **options, model_name_or_path=recipe[1] / "d2s")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preference": "ppo"}, "preference: must be one of kto_pair, dpo"),
        ({"beta": 0}, "beta: must be above 0"),
        ({"every": 0}, "every: must be at least 1"),
        ({"balance": -1}, "balance: must be at least 0"),
        ({"choices": 1}, "1 choices of 4 experts; there must be at least 2"),
        ({"experts": 2, "choices": 3}, "3 choices of 2 experts"),
        ({"capacity": 0}, "capacity_factor 0 must be above 0"),
    ],
)
def test_options_are_checked_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=f"--method_options .*{message}"):
        find_method("llava_mod", options)


def test_data_without_pairs_do_not_go_with_the_preference_stage(siglip, tmp_path):
    from llava_compodistill.train.data import CheckedDataset
    from llava_compodistill.train.trainer import CompoDistillTrainer

    model = make_model(siglip)
    args = TrainingArguments(str(tmp_path), stage="preference", method="llava_mod", use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=r"make_data_module\(..., paired=True\)"):
        CompoDistillTrainer(model, args, model, train_dataset=CheckedDataset.__new__(CheckedDataset))


def test_the_last_answer_alone_is_compared():
    labels = torch.tensor([-100, 5, 6, -100, -100, 7, 8, 9, -100])
    assert last_answer(labels).tolist() == [-100, -100, -100, -100, -100, 7, 8, 9, -100]
    assert last_answer(torch.tensor([5, 6])).tolist() == [5, 6]
    assert last_answer(torch.tensor([-100, -100])).tolist() == [-100, -100]


def test_a_pair_that_the_limit_has_cut_is_left_out(siglip, tmp_path):
    teacher = make_model(siglip, seed=1, dtype=torch.float32).requires_grad_(False)
    student = make_model(siglip, seed=2, dtype=torch.float32, tokenizer_model_max_length=22)
    args = TrainingArguments(str(tmp_path), stage="preference", method="llava_mod", use_cpu=True, report_to=[])
    term = args.chosen_method.terms("preference", args)[0]
    objective = Objective(student, teacher, [term], 91)

    def loss(layouts):
        with objective.running():
            sums = objective(student, {**make_batch(layouts, dtype=torch.float32).inputs, "use_cache": False})
        found = sums["preference"]
        return found.measured["pairs_cut"][0].item(), found.loss.item(), found.logged["preference"].item()

    # 16 visual tokens: a sample of 22 or more may have been cut.
    cut, both, _ = loss(["qIqaa", "qIqaa", "qIqaaa", "qIqaa"])
    assert cut == 0 and both > 0
    cut, one, _ = loss(["qIqaa", "qIqaa", "qIqaaaaaaa", "qIqaa"])
    assert cut == 1 and 0 < one < both
    assert loss(["qIqaa", "qIqaaaaaaa"])[::2] == (1, 0)


def test_pairs_are_checked():
    from llava_compodistill.train.records import find_pair_problem

    sample = tiny.sample(0, "x.png", 1)
    assert find_pair_problem({**sample, "rejected": "Green"}) is None
    assert "no rejected" in find_pair_problem({**sample, "rejected": " "})
    assert "<image>" in find_pair_problem({**sample, "rejected": "<image>\nA dog"})
    assert "half a character" in find_pair_problem({**sample, "rejected": "\ud800"})
    assert "the chosen one" in find_pair_problem({**sample, "rejected": sample["conversations"][-1]["value"]})
    turns = [*sample["conversations"], {"from": "human", "value": "And?"}]
    assert "nothing to reject" in find_pair_problem({**sample, "conversations": turns, "rejected": "x"})
