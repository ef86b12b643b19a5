"""Switch-KD: differences of logits, and the teacher on the student's visual features."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from factory import make_batch, make_model, save_tower
from test_rivals import gradients, whole

from llava_compodistill.hosts.llava.trained_towers import train_tower
from llava_compodistill.losses import bild
from llava_compodistill.losses.bild import Differences, dbild_loss, knee
from llava_compodistill.methods import find_method
from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.objective import Objective

LAYOUTS = ["qIqqIqaaqa", "Iqa", "qqqaa", "qqIqaqaa"]
VOCAB = 91


# ---------------------------------------------------------------------------------------------------------------------
# DBiLD
# ---------------------------------------------------------------------------------------------------------------------
def reference_knee(ordered: list[float]) -> int:
    span, best = ordered[0] - ordered[-1], (-math.inf, 0)
    for rank, value in enumerate(ordered):
        chord = 1 - rank / (len(ordered) - 1)
        distance = chord - ((value - ordered[-1]) / span if span else 0.0)
        if distance > best[0]:
            best = distance, rank
    return best[1] + 1


def reference_dbild(student, teacher, options):
    """The sum over rows, pair by pair."""
    total = student.new_zeros(())
    for mine, theirs in zip(student, teacher, strict=True):
        for leader in (theirs, mine):
            order = sorted(range(len(leader)), key=lambda token: -leader[token].item())[: options.most]
            count = reference_knee([leader[token].item() for token in order])
            order = order[: min(max(count, options.least), options.most)]
            pairs = [(first, second) for place, first in enumerate(order) for second in order[place + 1 :]]
            p, q = (
                torch.stack([(z[a] - z[b]) / options.temperature for a, b in pairs]).softmax(0) for z in (mine, theirs)
            )
            total = total + (p * (p / q).log()).sum()
    return total


@pytest.mark.parametrize("size", [2, 7, 64])
def test_the_knee_is_where_the_curve_lies_farthest_below_its_chord(size):
    curves = [torch.randn(size, dtype=torch.float64).sort(descending=True).values for _ in range(5)]
    curves += [torch.zeros(size, dtype=torch.float64), -torch.arange(size, dtype=torch.float64).log1p()]
    assert knee(torch.stack(curves)).tolist() == [reference_knee(curve.tolist()) for curve in curves]
    steep = torch.cat([torch.tensor([9.0, 8.5, 8.0]), torch.linspace(0.1, 0, 20)])
    assert knee(steep[None]).item() == 4, "the first of the tail"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows, vocab, options", [(7, 23, Differences(3.0, 4, 9)), (3, 5, Differences(1.5, 3, 64))])
def test_dbild_of_heads(monkeypatch, rows, vocab, options, bias):
    """Chunks of rows, heads of other sizes, padding beyond the vocabulary; gradients in full."""
    monkeypatch.setattr(bild, "_rows", lambda weight, size: 2)
    sizes = ((vocab + 3, 6), (vocab + 1, 10))
    weights = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    hidden = [torch.randn(rows, size[1], dtype=torch.float64, requires_grad=True) for size in sizes]
    biases = [torch.randn(size[0], dtype=torch.float64, requires_grad=True) if bias else None for size in sizes]
    found = dbild_loss(
        hidden[0], weights[0], hidden[1], weights[1], options,
        student_bias=biases[0], teacher_bias=biases[1], vocab_size=vocab,
    )  # fmt: skip
    mine, theirs = (h @ w.T + (0 if b is None else b) for h, w, b in zip(hidden, weights, biases, strict=True))
    expected = reference_dbild(mine[:, :vocab], theirs[:, :vocab].detach(), options)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10) and found.item() > 0.01
    trained = [part for part in (hidden[0], weights[0], biases[0]) if part is not None]
    gradients_of = [torch.autograd.grad(2 * loss, trained) for loss in (found, expected)]
    for ours, reference in zip(*gradients_of, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-12, rtol=1e-9)


def test_dbild_without_rows_and_with_nothing_to_learn():
    weight, hidden = torch.randn(40, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    nothing = dbild_loss(hidden[:0], weight, hidden[:0], weight)
    assert nothing.item() == 0 and torch.autograd.grad(nothing, weight)[0].abs().sum() == 0
    same = dbild_loss(hidden, weight, hidden.detach(), weight.detach())
    assert abs(same.item()) < 1e-6
    assert all(gradient.abs().max() < 1e-6 for gradient in torch.autograd.grad(same, (hidden, weight)))


def test_dbild_of_a_16_bit_head():
    torch.manual_seed(0)
    inputs = [torch.randn(size).bfloat16().requires_grad_() for size in ((6, 16), (50, 16), (6, 8), (50, 8))]
    found = dbild_loss(*inputs)
    exact = [part.detach().double().requires_grad_() for part in inputs]
    expected = dbild_loss(*exact)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=0.05)
    ours, reference = torch.autograd.grad(found, inputs[:2]), torch.autograd.grad(expected, exact[:2])
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.dtype == torch.bfloat16 and (mine.double() - theirs).norm() < 0.1 * theirs.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        widened = dbild_loss(*(part.detach().float() for part in inputs))
    assert widened.item() == pytest.approx(found.item(), rel=1e-6)


def test_dbild_refuses_what_it_cannot_compute():
    weight, hidden = torch.randn(40, 8), torch.randn(5, 8)
    with pytest.raises(ValueError, match="must have the same rows, got 5 and 4"):
        dbild_loss(hidden, weight, hidden[:4], weight)
    with pytest.raises(ValueError, match="3 <= least <= most must hold"):
        dbild_loss(hidden, weight, hidden, weight, Differences(3.0, 2, 5))


# ---------------------------------------------------------------------------------------------------------------------
# The switch
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def masks_of_float64(monkeypatch):
    # transformers 4.37 fills eager attention's mask with float64's smallest number in torch's default dtype.
    monkeypatch.setattr(torch, "full", partial(torch.full, dtype=torch.float64))


def make_pair(siglip):
    teacher = make_model(siglip, hidden=48, layers=3, heads=6, vocab=128, seed=1, attention="eager")
    teacher.requires_grad_(False)
    student = make_model(siglip, layers=2, seed=2, attention="eager", unfreeze_mm_vision_tower=True)
    train_tower(student.get_vision_tower())
    return student, teacher


def make_objective(pair, folder, options="{}"):
    args = TrainingArguments(
        str(folder), stage="dft", use_cpu=True, report_to="none", method="switch_kd", method_options=options
    )
    return Objective(*pair, args.chosen_method.terms("dft", args), VOCAB)


def run(objective, batch):
    """The weighted sum of the terms, backwards; (sums, gradients of the student)."""
    student = objective.pair.student
    student.zero_grad()
    with objective.running():
        sums = objective(student, {**batch.inputs, "use_cache": False})
        trained = {name: found.loss for name, found in sums.items() if found.loss is not None}
        sum(objective.term(name).weight * loss for name, loss in trained.items()).backward()
    return {name: float(loss.detach()) for name, loss in trained.items()}, gradients(student)


def logits(model, batch):
    """Of all rows that predict an answer token, and these tokens. (4.37 rounds what a head returns to float32.)"""
    outputs, merged = whole(model, batch.inputs)
    rows = merged.labels[:, 1:] != -100
    return outputs.hidden_states[-1][:, :-1][rows] @ model.lm_head.weight.T, merged.labels[:, 1:][rows]


def test_switch_kd(siglip, tmp_path, monkeypatch):
    student, teacher = pair = make_pair(siglip)
    frozen = {name: value.clone() for name, value in teacher.state_dict().items()}
    options = Differences(2.0, 3, 8)
    objective = make_objective(pair, tmp_path, '{"l1": 0.5, "l2": 20.0, "tau": 2.0, "k_min": 3, "k_max": 8}')
    batch = make_batch(LAYOUTS)
    sums, found = run(objective, batch)

    student.zero_grad()
    tower = student.get_vision_tower().vision_tower
    features = tower(batch.inputs["images"], output_hidden_states=True).hidden_states[-2]
    z_s, labels = logits(student, batch)
    z_t, _ = logits(teacher, batch)
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "encode_images", lambda images: teacher.get_model().mm_projector(features))
        z_sw, _ = logits(teacher, batch)
    lm = torch.nn.functional.cross_entropy(z_s, labels, reduction="sum")
    align, switch = (reference_dbild(z[:, :VOCAB], z_t[:, :VOCAB].detach(), options) for z in (z_s, z_sw))
    for name, value in (("answers", lm), ("align", align), ("switch", switch)):
        assert sums[name] == pytest.approx(value.item(), rel=1e-6) and sums[name] > 1e-3, name
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained.keys() == found.keys()
    through_teacher = torch.autograd.grad(switch, [*trained.values()], retain_graph=True, allow_unused=True)
    for name, gradient in zip(trained, through_teacher, strict=True):
        assert (gradient is not None) == ("vision_tower" in name), "it trains the encoder, and the encoder alone"
    (lm + 0.5 * align + 20 * switch).backward()
    expected = gradients(student)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=5e-7, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert value.abs().max() > 1e-5 or name.endswith("k_proj.bias"), name  # which a softmax does not depend on
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert "encode_images" not in vars(teacher) and "encode_images" not in vars(student)


def test_terms_of_weight_0_are_left_out(siglip, tmp_path):
    student, teacher = make_pair(siglip)
    student.get_vision_tower().requires_grad_(False)
    objective = make_objective((student, teacher), tmp_path, '{"l2": 0}')
    sums, _ = run(objective, make_batch(LAYOUTS))
    assert sums.keys() == {"answers", "align"}
    train_tower(student.get_vision_tower())
    assert run(make_objective((student, teacher), tmp_path, '{"l1": 0}'), make_batch(LAYOUTS))[0].keys() == {
        "answers", "switch",
    }  # fmt: skip


def test_a_batch_of_text_has_nothing_to_switch(siglip, tmp_path):
    objective = make_objective(make_pair(siglip), tmp_path)
    switched = []
    objective._run_switched = lambda *args: switched.append(args)
    sums, found = run(objective, make_batch(["qqaa", "qa"]))
    assert "switch" not in sums and sums["align"] > 1e-3 and not switched, "the teacher does not run again for it"
    tower = [value for name, value in found.items() if "vision_tower" in name]
    assert tower and all(value.abs().max() == 0 for value in tower), "met in every step, as DDP wants"


def test_an_equal_encoder_switches_nothing(siglip, tmp_path):
    student, teacher = make_pair(siglip)
    theirs = teacher.get_vision_tower().vision_tower.state_dict()
    tower = student.get_vision_tower().vision_tower
    prefix = "" if next(iter(theirs)).startswith("vision_model") else "vision_model."
    tower.load_state_dict({prefix + name: value for name, value in theirs.items()})
    sums, _ = run(make_objective((student, teacher), tmp_path), make_batch(LAYOUTS))
    assert sums["switch"] == pytest.approx(0, abs=1e-10) and sums["align"] > 1e-2


def test_with_gradient_checkpointing_the_teachers_layers_run_again(siglip, tmp_path):
    student, teacher = pair = make_pair(siglip)
    calls = []
    teacher.get_model().layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    objective, batch = make_objective(pair, tmp_path), make_batch(LAYOUTS)
    sums, expected = run(objective, batch)
    assert len(calls) == 2, "its own pass and the switched one"
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    assert run(objective, batch)[0] == pytest.approx(sums, rel=1e-9) and len(calls) == 2 + 3
    for name, value in gradients(student).items():
        torch.testing.assert_close(value, expected[name], atol=1e-12, rtol=1e-9)
    assert all("forward" not in vars(layer) for layer in teacher.get_model().layers)


def test_an_encoder_of_another_size_is_refused(siglip, tmp_path):
    student, teacher = make_pair(save_tower(tmp_path / "coarse", patches=4))[0], make_pair(siglip)[1]
    with pytest.raises(ValueError, match=r"\(16 and 4 an image\): align compares answers"):
        make_objective((student, teacher), tmp_path)
    student, teacher = make_pair(siglip)
    student.get_vision_tower().config.hidden_size = 48
    with pytest.raises(ValueError, match="reads 64 features a patch and the student's encoder gives 48"):
        make_objective((student, teacher), tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"l1": -1.0}, "l1: a loss weight cannot be negative, got -1.0"),
        ({"tau": 0.0}, "tau: must be greater than 0"),
        ({"k_min": 2}, "3 <= k_min <= k_max must hold .* got 2 and 64"),
        ({"k_max": 3}, "got 4 and 3"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        find_method("switch_kd", options)
