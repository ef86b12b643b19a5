"""The chunked answer loss against a plain computation in float64, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from checks import skip_halves

from llava_compodistill.losses import IGNORE_INDEX, answer_rows, logit_distillation_loss
from llava_compodistill.ops.answer_loss import answer_loss, chunked
from llava_compodistill.ops.answer_loss.log_probs import answer_log_probs

pytestmark = pytest.mark.once  # nothing here depends on transformers


def make_inputs(rows=11, student_vocab=17, teacher_vocab=20, dtype=torch.float64, seed=0):
    skip_halves(dtype)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return dict(
        student_hidden=normal(rows, 6),
        student_head_weight=normal(student_vocab, 6),
        labels=torch.randint(0, student_vocab, (rows,), generator=generator),
        teacher_hidden=normal(rows, 9),
        teacher_head_weight=normal(teacher_vocab, 9),
        student_bias=normal(student_vocab),
        teacher_bias=normal(teacher_vocab),
    )


def plain(inputs, temperature=1.0, vocab_size=None, kl_row_weights=None):
    """Whole logits, textbook formulas, in the dtype of the inputs with a softmax in at least float32."""
    student = F.linear(inputs["student_hidden"], inputs["student_head_weight"], inputs.get("student_bias"))
    student = student if student.dtype == torch.float64 else student.float()
    lm = F.cross_entropy(student, inputs["labels"], reduction="sum")
    if inputs.get("teacher_hidden") is None:
        return lm, torch.zeros_like(lm)
    teacher = F.linear(inputs["teacher_hidden"], inputs["teacher_head_weight"], inputs.get("teacher_bias"))
    teacher = teacher.detach().to(student.dtype)
    common = vocab_size or min(student.shape[1], teacher.shape[1])
    p = torch.softmax(teacher[:, :common] / temperature, dim=1)
    q = torch.softmax(student[:, :common] / temperature, dim=1)
    rows = (p * (p / q).log()).sum(dim=1) * temperature**2
    return lm, rows.sum() if kl_row_weights is None else (kl_row_weights.to(rows.dtype) * rows).sum()


#: The gradient that arrives at the loss: made in the forward pass, the op's gradients must take it up.
SCALE = 3.0


def run(function, inputs, weights=(1.0, 1.0), train=("student_hidden", "student_head_weight", "student_bias"), **kw):
    """(lm_sum, kl_sum, gradients of the weighted sum)."""
    inputs = {k: v.detach().requires_grad_(k in train) if v is not None else None for k, v in inputs.items()}
    if function is plain:
        lm, kl = plain(inputs, **kw)
        loss = weights[0] * lm + weights[1] * kl
    else:
        loss, lm, kl = function(**inputs, lm_weight=weights[0], kl_weight=weights[1], **kw)
        assert not lm.requires_grad and not kl.requires_grad
        torch.testing.assert_close(loss.detach(), weights[0] * lm + weights[1] * kl)
    (SCALE * loss).backward()
    return [lm.detach(), kl.detach(), *(inputs[name].grad / SCALE for name in train)]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("student_vocab", "teacher_vocab", "vocab_size"), [(17, 17, None), (17, 20, None), (20, 17, None), (19, 20, 13)]
)
@pytest.mark.parametrize("chunk_rows", [1, 4, 10, 11, 1024])
def test_against_plain(temperature, student_vocab, teacher_vocab, vocab_size, chunk_rows):
    inputs = make_inputs(student_vocab=student_vocab, teacher_vocab=teacher_vocab)
    options = dict(temperature=temperature, vocab_size=vocab_size)
    # Weights that differ: the two terms must keep their own gradients.
    expected = run(plain, inputs, weights=(0.3, 1.7), **options)
    result = run(answer_loss, inputs, weights=(0.3, 1.7), chunk_rows=chunk_rows, **options)
    for value, exact in zip(result, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_single_terms(weights):
    inputs = make_inputs()
    expected = run(plain, inputs, weights=weights)
    for value, exact in zip(run(answer_loss, inputs, weights=weights), expected, strict=True):
        torch.testing.assert_close(value, exact)


def test_without_teacher_and_bias():
    inputs = make_inputs()
    for name in ("teacher_hidden", "teacher_head_weight", "teacher_bias", "student_bias"):
        inputs[name] = None
    train = ("student_hidden", "student_head_weight")
    result = run(answer_loss, inputs, train=train, chunk_rows=3)
    for value, exact in zip(result, run(plain, inputs, train=train), strict=True):
        torch.testing.assert_close(value, exact)
    assert result[1].item() == 0


def test_gradients_are_handed_out_once():
    inputs = make_inputs()
    inputs["student_hidden"].requires_grad_()
    loss = answer_loss(**inputs).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call it again for a second backward"):
        loss.backward()


def test_without_grad_mode_nothing_is_made_for_the_backward(monkeypatch):
    inputs = make_inputs()
    inputs["student_hidden"].requires_grad_()
    monkeypatch.setattr(chunked._Run, "_gradients", lambda *args: pytest.fail("made gradients"))
    with torch.no_grad():
        result = answer_loss(**inputs)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.kl, plain(inputs)[1].detach())


def test_identical_models_have_no_divergence():
    inputs = make_inputs(dtype=torch.float32)
    for part in ("hidden", "head_weight", "bias"):
        inputs[f"teacher_{part}"] = inputs[f"student_{part}"]
    result = run(answer_loss, inputs, weights=(0.0, 1.0), temperature=2.0, chunk_rows=4)
    assert result[1].abs() < 1e-5 and all((grad.abs() < 1e-6).all() for grad in result[2:])


@pytest.mark.parametrize("with_teacher", [True, False])
def test_no_rows(with_teacher):
    inputs = make_inputs(rows=0)
    if not with_teacher:
        inputs["teacher_hidden"] = inputs["teacher_head_weight"] = inputs["teacher_bias"] = None
    lm, kl, *grads = run(answer_loss, inputs)
    assert lm.item() == 0 and kl.item() == 0
    assert grads[0].shape == (0, 6) and (grads[1] == 0).all() and grads[1].shape == (17, 6)


def test_frozen_parts_get_no_gradient(monkeypatch):
    inputs = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in make_inputs().items()}
    inputs["student_head_weight"].requires_grad_(False)
    inputs["student_bias"].requires_grad_(False)
    calls = []
    monkeypatch.setattr(chunked._Run, "_add_to_weight", lambda *args: calls.append(args))
    monkeypatch.setattr(chunked._Run, "columns", lambda *args: calls.append(args))
    answer_loss(**inputs).loss.backward()
    assert not calls
    assert inputs["student_hidden"].grad is not None
    for name, tensor in inputs.items():
        assert tensor.grad is None or name == "student_hidden"

    # The head alone, as when everything under it is frozen
    inputs["student_head_weight"].requires_grad_()
    monkeypatch.undo()
    answer_loss(**inputs | dict(student_hidden=inputs["student_hidden"].detach())).loss.backward()
    expected = run(plain, make_inputs())
    torch.testing.assert_close(inputs["student_head_weight"].grad, expected[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk_rows", [7, 63, 64])  # 16-bit heads: several blocks of the vocabulary, but for 64
@pytest.mark.parametrize("options", [dict(), dict(temperature=2.0), dict(vocab_size=301)], ids=str)
def test_no_less_accurate_than_plain_in_the_same_dtype(dtype, chunk_rows, options):
    assert_no_less_accurate(dtype, chunk_rows, options)


def assert_no_less_accurate(dtype, chunk_rows, options):
    inputs = make_inputs(rows=64, student_vocab=333, teacher_vocab=340, dtype=dtype)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    truth, reference = run(plain, wide, **options), run(plain, inputs, **options)
    result = run(answer_loss, inputs, chunk_rows=chunk_rows, **options)
    assert result[0].dtype == result[1].dtype == torch.float32
    assert all(grad.dtype == dtype for grad in result[2:])
    for value, same, exact in zip(result, reference, truth, strict=True):
        tolerance = max(torch.finfo(value.dtype).eps, 1e-6) * exact.abs().max()
        assert (value - exact).abs().max() <= (same - exact).abs().max() + tolerance
    # A term that is wrong by more than rounding would not pass:
    assert (result[2] - truth[2]).abs().max() < 0.05 * truth[2].abs().max()


@pytest.mark.parametrize("weights, temperature", [((1.0, 80.0), 1.0), ((1.0, 1.0), 100.0), ((500.0, 0.0), 1.0)])
def test_large_weights_do_not_overflow_float16(weights, temperature):
    """Gradients are kept times a power of two, which has to leave room for the weights."""
    inputs = make_inputs(rows=64, student_vocab=33, teacher_vocab=40, dtype=torch.float16)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    options = {"weights": weights, "temperature": temperature}
    truth, result = run(plain, wide, **options), run(answer_loss, inputs, chunk_rows=16, **options)
    for value, exact in zip(result, truth, strict=True):
        assert value.isfinite().all()
        assert (value - exact).abs().max() < 0.02 * exact.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# Weights of rows
# ---------------------------------------------------------------------------------------------------------------------
def make_row_weights(rows, dtype=torch.float64):
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 11
    weights[1] = 0
    return weights.to(dtype)


@pytest.mark.parametrize(
    ("teacher_vocab", "vocab_size", "temperature"), [(17, None, 1.0), (20, 13, 1.0), (17, None, 2.5), (20, 13, 0.7)]
)
@pytest.mark.parametrize("chunk_rows", [1, 4, 1024])
@pytest.mark.parametrize("with_bias", [True, False])
def test_weighted_rows_against_plain(teacher_vocab, vocab_size, temperature, chunk_rows, with_bias):
    inputs, train = make_inputs(teacher_vocab=teacher_vocab), ("student_hidden", "student_head_weight", "student_bias")
    if not with_bias:
        inputs["student_bias"] = inputs["teacher_bias"] = None
        train = train[:2]
    options = dict(temperature=temperature, vocab_size=vocab_size, kl_row_weights=make_row_weights(11))
    expected = run(plain, inputs, weights=(0.3, 1.7), train=train, **options)
    result = run(answer_loss, inputs, weights=(0.3, 1.7), train=train, chunk_rows=chunk_rows, **options)
    for value, exact in zip(result, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-11)
    options["kl_row_weights"] = None
    unweighted = run(answer_loss, inputs, weights=(0.3, 1.7), train=train, chunk_rows=chunk_rows, **options)
    assert torch.equal(result[0], unweighted[0]), "L_LM has no weights"
    assert all((mine - other).norm() > 1 for mine, other in zip(result[1:], unweighted[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk_rows", [7, 64])
@pytest.mark.parametrize("options", [dict(), dict(temperature=2.0), dict(vocab_size=301)], ids=str)
def test_weights_of_one_do_not_change_a_bit(dtype, chunk_rows, options):
    inputs = make_inputs(rows=64, student_vocab=333, teacher_vocab=340, dtype=dtype)
    options = dict(weights=(0.1, 0.7), chunk_rows=chunk_rows, **options)
    expected = run(answer_loss, inputs, **options)
    for value, same in zip(run(answer_loss, inputs, kl_row_weights=torch.ones(64), **options), expected, strict=True):
        assert torch.equal(value, same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk_rows", [7, 64])
def test_weighted_rows_are_no_less_accurate_than_plain(dtype, chunk_rows):
    assert_no_less_accurate(dtype, chunk_rows, dict(kl_row_weights=make_row_weights(64, torch.float32)))


def test_large_row_weights_do_not_overflow_float16():
    inputs = make_inputs(rows=64, student_vocab=33, teacher_vocab=40, dtype=torch.float16)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    row_weights = make_row_weights(64) * 20
    truth = run(plain, wide, kl_row_weights=row_weights)
    result = run(answer_loss, inputs, kl_row_weights=row_weights, chunk_rows=16)
    for value, exact in zip(result, truth, strict=True):
        assert value.isfinite().all()
        assert (value - exact).abs().max() < 0.02 * exact.abs().max()


def test_no_rows_with_weights_and_no_gradient_to_them():
    weights = torch.ones(11, dtype=torch.float64, requires_grad=True)
    inputs = make_inputs()
    inputs["student_hidden"].requires_grad_()
    answer_loss(**inputs, kl_row_weights=weights).loss.backward()
    assert weights.grad is None
    for dtype in (torch.float16, torch.float32):
        assert run(answer_loss, make_inputs(rows=0, dtype=dtype), kl_row_weights=torch.ones(0))[1].item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_log_probs_of_answers(dtype, chunk_rows, with_bias):
    inputs = make_inputs(dtype=dtype)
    hidden, weight = inputs["student_hidden"].requires_grad_(), inputs["student_head_weight"]
    bias = inputs["student_bias"] if with_bias else None
    found = answer_log_probs(hidden, weight, inputs["labels"], bias=bias, chunk_rows=chunk_rows)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = F.linear(hidden, weight, bias).to(wide)
    expected = torch.stack([row.softmax(0)[label].log() for row, label in zip(logits, inputs["labels"], strict=True)])
    assert found.dtype == wide and not found.requires_grad
    torch.testing.assert_close(found, expected.detach())
    assert answer_log_probs(hidden[:0], weight, inputs["labels"][:0]).shape == (0,)


def test_log_probs_in_autocast_are_the_heads_own():
    inputs = make_inputs(dtype=torch.float32)
    arguments = inputs["student_hidden"], inputs["student_head_weight"], inputs["labels"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = answer_log_probs(*arguments)
    narrow = answer_log_probs(*(part.bfloat16() if part.is_floating_point() else part for part in arguments))
    assert found.dtype == torch.float32 and torch.equal(found, narrow)
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        answer_log_probs(*arguments, chunk_rows=0)
    with pytest.raises(ValueError, match=r"\[0, 17\)"):
        answer_log_probs(*arguments[:2], torch.full((11,), 17))


def test_mixed_dtypes_and_autocast():
    inputs = make_inputs(dtype=torch.float32)
    narrow_teacher = dict(inputs)
    for part in ("teacher_hidden", "teacher_head_weight", "teacher_bias"):
        narrow_teacher[part] = inputs[part].bfloat16()
    rounded = dict(inputs) | {n: t.float() for n, t in narrow_teacher.items() if n.startswith("teacher")}
    expected, result = run(plain, rounded), run(answer_loss, narrow_teacher)
    torch.testing.assert_close(result[0], expected[0])  # the student is not narrowed by its teacher
    torch.testing.assert_close(result[1], expected[1], rtol=2e-2, atol=0.1)

    exact = run(answer_loss, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lm, kl, *grads = run(answer_loss, inputs)
    narrow = run(answer_loss, {n: t.bfloat16() if t.is_floating_point() else t for n, t in inputs.items()})
    assert lm.dtype == torch.float32 and all(grad.dtype == torch.float32 for grad in grads)
    assert lm.item() == narrow[0].item() != exact[0].item()
    for grad, wide in zip(grads, exact[2:], strict=True):
        torch.testing.assert_close(grad, wide, rtol=0.1, atol=0.1)


def test_agrees_with_the_whole_sequence_reference():
    """Selected rows and sums here, whole logits and means there: the same L_KL and L_LM, causal shift included."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, 9, 6), torch.randn(2, 9, 8)
    head, teacher_head = torch.randn(15, 6), torch.randn(18, 8)
    labels = torch.randint(0, 15, (2, 9))
    labels[torch.rand(2, 9) < 0.5] = IGNORE_INDEX
    samples, rows, targets = answer_rows(labels)
    _, lm, kl = answer_loss(
        hidden[samples, rows], head, targets, teacher_hidden[samples, rows], teacher_head, temperature=2.0
    )
    logits, teacher_logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    expected = logit_distillation_loss(logits, teacher_logits, labels, temperature=2.0)
    torch.testing.assert_close(kl / len(targets), expected)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(lm / len(targets), expected)


def test_logits_live_one_chunk_at_a_time():
    shapes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                shapes.append(result.numel())
            return result

    inputs = make_inputs(rows=64, student_vocab=500, teacher_vocab=500)
    inputs["student_hidden"].requires_grad_()
    with Recorder():
        answer_loss(**inputs, chunk_rows=8).loss.backward()
    assert max(shapes) == 500 * 9  # the teacher's head; a chunk of logits has 8 rows
    assert 500 * 8 in shapes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(labels=torch.full((11,), IGNORE_INDEX)), ValueError, "answer_rows"),
        (dict(labels=torch.full((11,), 17)), ValueError, r"\[0, 17\)"),
        (dict(labels=torch.zeros(11)), TypeError, "int64"),
        (dict(labels=torch.zeros(10, dtype=torch.int64)), ValueError, r"\[11\], got \[10\]"),
        (dict(teacher_hidden=None), ValueError, "together"),
        (dict(teacher_hidden=torch.zeros(10, 9)), ValueError, "same rows"),
        (dict(student_head_weight=torch.zeros(17, 5)), ValueError, r"student.*\[17, 5\]"),
        (dict(student_bias=torch.zeros(16)), ValueError, r"\[17\], got \[16\]"),
        (dict(vocab_size=18), ValueError, r"\[1, 17\].*18"),
        (dict(temperature=0.0), ValueError, "temperature"),
        (dict(chunk_rows=0), ValueError, "chunk_rows"),
        (dict(kl_row_weights=torch.ones(10)), ValueError, r"\[11\], got torch.float32 \[10\]"),
        (dict(kl_row_weights=torch.ones(11, dtype=torch.int64)), ValueError, "floating point"),
        (
            dict(kl_row_weights=torch.ones(11), teacher_hidden=None, teacher_head_weight=None),
            ValueError,
            "give teacher_hidden",
        ),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        answer_loss(**make_inputs() | change)
