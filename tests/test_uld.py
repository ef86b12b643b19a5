"""L_ULD against plain sorting in float64, gradients included."""

from __future__ import annotations

import pytest
import torch

from llava_compodistill.ops.answer_loss.uld import uld_loss

pytestmark = pytest.mark.once  # nothing here depends on transformers

NAMES = ("student_hidden", "student_head_weight", "student_bias")


def make_inputs(rows=11, vocab=(17, 23), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return dict(
        student_hidden=normal(rows, 6), student_head_weight=normal(vocab[0], 6), student_bias=normal(vocab[0]),
        teacher_hidden=normal(rows, 9), teacher_head_weight=normal(vocab[1], 9), teacher_bias=normal(vocab[1]),
    )  # fmt: skip


def plain(inputs, temperature=1.0, vocab_sizes=(None, None), rounded=torch.float64):
    """Row by row and rank by rank, in float64; the logits rounded, where ranks that are close may change places."""
    total = torch.zeros((), dtype=torch.float64)
    models = []
    for name, size in zip(("student", "teacher"), vocab_sizes, strict=True):
        hidden, weight = inputs[f"{name}_hidden"].double(), inputs[f"{name}_head_weight"].double()
        bias = inputs.get(f"{name}_bias")
        logits = hidden @ weight.T + (0 if bias is None else bias.double())
        logits = logits + (logits.to(rounded).double() - logits).detach()
        exponents = (logits[:, :size] / temperature).exp()
        models.append(exponents / exponents.sum(1, keepdim=True))
    for mine, theirs in zip(models[0], models[1].detach(), strict=True):
        mine, theirs = (sorted(p, key=lambda one: one.item(), reverse=True) for p in (mine, theirs))
        for rank in range(max(len(mine), len(theirs))):
            p = mine[rank] if rank < len(mine) else torch.zeros((), dtype=torch.float64)
            q = theirs[rank] if rank < len(theirs) else torch.zeros((), dtype=torch.float64)
            total = total + (p - q).abs()
    return total


def run(function, inputs, scale=3.0, **options):
    inputs = {k: None if v is None else v.detach().clone().requires_grad_(k in NAMES) for k, v in inputs.items()}
    loss = function(inputs, **options) if function is plain else function(**inputs, **options)
    (scale * loss).backward()
    grads = [inputs[name].grad / scale for name in NAMES if inputs[name] is not None]
    return [loss.detach(), *grads]


@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize(
    "vocab, sizes", [((17, 23), (None, None)), ((23, 17), (21, 11)), ((17, 17), (17, 3)), ((17, 40), (1, 40))]
)
def test_loss_and_gradients(vocab, sizes, chunk_rows):
    inputs = make_inputs(vocab=vocab)
    for temperature in (1.0, 2.5):
        options = {"temperature": temperature, "vocab_sizes": sizes}
        found = run(lambda **kw: uld_loss(**kw, chunk_rows=chunk_rows), inputs, **options)
        for mine, reference in zip(found, run(plain, inputs, **options), strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-10, rtol=1e-9)


def test_gradients_are_those_of_finite_differences():
    inputs = make_inputs(rows=3, vocab=(7, 5))
    grads = dict(zip(NAMES, run(uld_loss, inputs, chunk_rows=2)[1:], strict=True))
    for name, grad in grads.items():
        for place in torch.cartesian_prod(*map(torch.arange, grad.shape)).view(-1, grad.ndim).tolist():
            ends = []
            for step in (1e-6, -1e-6):
                moved = inputs[name].clone()
                moved[tuple(place)] += step
                ends.append(float(uld_loss(**{**inputs, name: moved}, chunk_rows=2)))
            assert float(grad[tuple(place)]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7)


def test_the_same_distribution_over_other_tokens_costs_nothing():
    inputs = make_inputs(vocab=(17, 17))
    order = torch.randperm(17)
    same = {
        **inputs, "teacher_hidden": inputs["student_hidden"],
        "teacher_head_weight": inputs["student_head_weight"][order], "teacher_bias": inputs["student_bias"][order],
    }  # fmt: skip
    loss, *grads = run(uld_loss, same)
    assert loss < 1e-12
    # A row and a certainty of another are as far apart as can be.
    far = {**inputs, "student_bias": 1e4 * torch.eye(17)[0].double()}
    even = {**far, "teacher_head_weight": inputs["teacher_head_weight"] * 0, "teacher_bias": None}
    assert float(uld_loss(**even)) == pytest.approx(11 * 2 * 16 / 17)


def test_no_rows_and_frozen_parts():
    inputs = make_inputs(rows=0)
    loss, *grads = run(uld_loss, inputs)
    assert loss == 0 and all(not grad.any() for grad in grads)
    inputs = make_inputs()
    inputs["teacher_hidden"].requires_grad_()
    assert not uld_loss(**inputs).requires_grad, "the teacher gets no gradient"
    inputs["student_hidden"].requires_grad_()
    loss = uld_loss(**{**inputs, "student_bias": None, "teacher_bias": None})
    loss.backward()
    assert inputs["student_hidden"].grad.any() and inputs["student_head_weight"].grad is None
    with pytest.raises(RuntimeError, match="call it again for a second backward pass"):
        loss.backward()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
def test_narrow_inputs_stay_near(dtype, tolerance):
    inputs = make_inputs(rows=40, dtype=dtype)
    found = run(lambda **kw: uld_loss(**kw, chunk_rows=16), inputs)
    expected = run(plain, inputs, rounded=dtype)
    assert found[0].dtype == torch.float32 and [grad.dtype for grad in found[1:]] == [dtype] * 3
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=tolerance)
    for mine, reference in zip(found[1:], expected[1:], strict=True):
        assert (mine.double() - reference.double()).norm() < tolerance * reference.double().norm() + 1e-9


def test_under_autocast_only_products_are_narrow():
    inputs = make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(uld_loss, inputs)
    expected = run(plain, inputs)
    assert found[0].dtype == torch.float32 and found[0].item() != expected[0].item()
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=0.03)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, got 0"),
        ({"vocab_sizes": (18, None)}, r"vocab_sizes must lie in \[1, 17\], .* got 18"),
        ({"teacher_hidden": torch.zeros(3, 9)}, "must have the same rows, got 11 and 3"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        uld_loss(**{**make_inputs(), **changes})
