"""The loss terms against loops in float64, their masks, and their gradients at the edges."""

import math

import numpy as np
import pytest
import torch

from llava_compodistill.losses import (
    IGNORE_INDEX,
    answer_rows,
    attention_distillation_loss,
    attention_similarity,
    counting_samples,
    logit_distillation_loss,
)

pytestmark = pytest.mark.once  # nothing here depends on transformers

KINDS = [("cosine", "row"), ("cosine", "matrix"), ("mse", "row"), ("kl", "row")]


def make_maps(batch=3, length=7, columns=5, heads=None, seed=0):
    """Random sub-stochastic maps, ragged visual keys, rows that do not count; sample 2 is text only."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, columns) if heads is None else (batch, heads, length, columns)
    student, teacher = (torch.rand(shape, generator=generator, dtype=torch.float64) / columns for _ in range(2))
    column_mask = torch.ones(batch, columns, dtype=torch.bool)
    column_mask[1, 3:] = False
    column_mask[2] = False
    row_mask = torch.rand(batch, length, generator=generator) > 0.3
    row_mask[:2, 4] = True
    row_mask[2] = False
    dead = ~(column_mask[:, None, :] & torch.ones(length, 1, dtype=torch.bool))
    dead = dead if heads is None else dead[:, None]
    return student.masked_fill(dead, 0), teacher.masked_fill(dead, 0), row_mask, column_mask


def row_loss(s, t, kind):
    if kind == "cosine":
        return 1 - (s * t).sum() / math.sqrt((s * s).sum() * (t * t).sum())
    if kind == "mse":
        return ((s - t) ** 2).mean()
    s, t = s / s.sum(), t / t.sum()
    return (t * np.log(t / s)).sum()


def loop_loss(student, teacher, row_mask, column_mask, kind, similarity):
    """Per-sample losses by plain loops; maps [B, H, N, N_v]."""
    losses = []
    for b in range(student.shape[0]):
        rows, columns = row_mask[b].numpy(), column_mask[b].numpy()
        if not rows.any():
            losses.append(None)
            continue
        per_head = []
        for h in range(student.shape[1]):
            s, t = (m[b, h].numpy()[rows][:, columns] for m in (student, teacher))
            if similarity == "matrix":
                per_head.append(row_loss(s.ravel(), t.ravel(), kind))
            else:
                per_head.append(np.mean([row_loss(x, y, kind) for x, y in zip(s, t, strict=True)]))
        losses.append(float(np.mean(per_head)))
    return losses


@pytest.mark.parametrize(("kind", "similarity"), KINDS)
@pytest.mark.parametrize("heads", [None, 3])
def test_against_loops(kind, similarity, heads):
    student, teacher, row_mask, column_mask = make_maps(heads=heads)
    wide = [m if heads else m[:, None] for m in (student, teacher)]
    expected = loop_loss(*wide, row_mask, column_mask, kind, similarity)
    assert expected[2] is None
    options = dict(kind=kind, similarity=similarity, column_mask=column_mask)
    each = attention_distillation_loss(student, teacher, row_mask, reduction="none", **options)
    assert each.dtype == torch.float64
    assert each.tolist() == pytest.approx([expected[0], expected[1], 0.0], rel=1e-12)
    mean = attention_distillation_loss(student, teacher, row_mask, **options)
    assert mean.item() == pytest.approx((expected[0] + expected[1]) / 2, rel=1e-12)
    low = attention_distillation_loss(student.float(), teacher.float(), row_mask, **options)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(mean.item(), rel=1e-5)
    assert counting_samples(row_mask, column_mask).tolist() == [True, True, False]


@pytest.mark.parametrize(("kind", "similarity"), KINDS)
def test_gradcheck(kind, similarity):
    student, teacher, row_mask, column_mask = make_maps(length=5, columns=4)
    column_mask = column_mask[:, :4]

    def loss(s):
        # Padded columns hold 0 in every map, so the perturbation of gradcheck must not reach them.
        return attention_distillation_loss(s, teacher, row_mask, kind, similarity, column_mask=column_mask)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


BY_ROWS = [pair for pair in KINDS if pair != ("cosine", "matrix")]


@pytest.mark.parametrize(("kind", "similarity"), BY_ROWS)
@pytest.mark.parametrize("heads", [None, 3])
def test_weighted_rows_against_loops(kind, similarity, heads):
    student, teacher, row_mask, column_mask = make_maps(heads=heads)
    weights = torch.rand(row_mask.shape, dtype=torch.float64) * 3
    weights[:, 4] = 0  # of a row that counts otherwise
    weights[~row_mask] = float("nan")
    options = dict(kind=kind, similarity=similarity, column_mask=column_mask)

    def loss(s):
        return attention_distillation_loss(s, teacher, row_mask, row_weights=weights, reduction="none", **options)

    expected = []
    for sample in range(2):
        total = mass = 0.0
        for row in (row_mask[sample] & (weights[sample] > 0)).nonzero()[:, 0].tolist():
            weight, columns = weights[sample, row].item(), column_mask[sample].numpy()
            maps = [m[sample][None] if heads is None else m[sample] for m in (student, teacher)]
            pairs = zip(*(m[:, row].numpy()[:, columns] for m in maps), strict=True)
            total += weight * np.mean([row_loss(s, t, kind) for s, t in pairs])
            mass += weight
        expected.append(total / mass)
    assert loss(student).tolist() == pytest.approx([*expected, 0.0], rel=1e-12)
    plain = attention_distillation_loss(student, teacher, row_mask, reduction="none", **options)
    assert (loss(student) - plain)[:2].abs().min() > 1e-4
    if heads is None:
        assert torch.autograd.gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize(("kind", "similarity"), BY_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_weights_of_one_do_not_change_a_bit(kind, similarity, dtype):
    student, teacher, row_mask, column_mask = (x.to(dtype) if x.is_floating_point() else x for x in make_maps())
    found = []
    for weights in (None, torch.ones(row_mask.shape)):
        mine = student.clone().requires_grad_()
        options = dict(column_mask=column_mask, row_weights=weights)
        loss = attention_distillation_loss(mine, teacher, row_mask, kind, similarity, **options)
        loss.backward()
        found.append((loss.detach(), mine.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_a_sample_whose_rows_all_weigh_nothing_does_not_count():
    student, teacher, row_mask, column_mask = make_maps()
    weights = torch.ones(row_mask.shape)
    weights[1] = 0
    options = dict(column_mask=column_mask, row_weights=weights)
    each = attention_distillation_loss(student, teacher, row_mask, reduction="none", **options)
    assert each[0] > 0 and each[1:].tolist() == [0.0, 0.0]
    assert attention_distillation_loss(student, teacher, row_mask, **options) == each[0]


@pytest.mark.parametrize(("kind", "similarity"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_identical_maps_give_zero_loss(kind, similarity, dtype):
    student, _, row_mask, column_mask = make_maps()
    student = student.to(dtype)
    loss = attention_distillation_loss(student, student, row_mask, kind, similarity, column_mask=column_mask)
    assert abs(loss.item()) < 1e-6
    if kind == "cosine":
        assert attention_similarity(student, student, row_mask, similarity).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("similarity", ["row", "matrix"])
def test_similarity_is_one_minus_the_loss(similarity):
    student, teacher, row_mask, column_mask = make_maps()
    for reduction in ("mean", "none"):
        options = dict(column_mask=column_mask, reduction=reduction)
        loss = attention_distillation_loss(student, teacher, row_mask, "cosine", similarity, **options)
        value = attention_similarity(student, teacher, row_mask, similarity, **options)
        counted = 1.0 if reduction == "mean" else counting_samples(row_mask).double()
        assert torch.allclose(value + loss, torch.as_tensor(counted, dtype=torch.float64).expand_as(value))


@pytest.mark.parametrize(("kind", "similarity"), KINDS)
def test_rows_and_columns_that_do_not_count_have_no_influence(kind, similarity):
    student, teacher, row_mask, column_mask = make_maps()
    options = dict(kind=kind, similarity=similarity)
    loss = attention_distillation_loss(student, teacher, row_mask, column_mask=column_mask, **options)

    padded = [torch.nn.functional.pad(m, (0, 4)) for m in (student, teacher)]
    more_columns = torch.nn.functional.pad(column_mask, (0, 4))
    again = attention_distillation_loss(*padded, row_mask, column_mask=more_columns, **options)
    assert again.item() == pytest.approx(loss.item(), rel=1e-12)
    if kind != "mse":  # zeros alone keep a padded column out
        without = attention_distillation_loss(*padded, row_mask, **options)
        assert without.item() == pytest.approx(loss.item(), rel=1e-12)

    noisy = student.clone()
    noisy[~row_mask] = float("nan")
    noisy = noisy.masked_fill(~column_mask[:, None], float("nan")).requires_grad_()
    again = attention_distillation_loss(noisy, teacher, row_mask, column_mask=column_mask, **options)
    again.backward()
    assert again.item() == pytest.approx(loss.item(), rel=1e-12)
    counted = row_mask[:, :, None] & column_mask[:, None]
    assert torch.isfinite(noisy.grad).all() and (noisy.grad[~counted] == 0).all()
    assert (noisy.grad[counted] != 0).any()


@pytest.mark.parametrize(("kind", "similarity"), KINDS)
@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_zero_rows_give_no_nan(kind, similarity, zero):
    student, teacher, row_mask, column_mask = (x.float() if x.is_floating_point() else x for x in make_maps())
    row_mask[0] = True
    if zero in ("student", "both"):
        student[0, 2] = 0
    if zero in ("teacher", "both"):
        teacher[0, 2] = 0
    student[1], teacher[1] = 0, 0  # a whole sample
    student.requires_grad_()
    loss = attention_distillation_loss(student, teacher, row_mask, kind, similarity, column_mask=column_mask)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
    assert (student.grad[0, 1] != 0).any()


def test_tiny_attention_keeps_its_direction():
    # Rows that give the image a mass of 1e-25: their squares are below the range of float32.
    student, teacher, row_mask, column_mask = make_maps()
    expected = attention_similarity(student, teacher, row_mask).item()
    tiny = (student * 1e-25).float().requires_grad_()
    value = attention_similarity(tiny, (teacher * 1e-25).float(), row_mask)
    assert value.item() == pytest.approx(expected, abs=1e-6)
    value.backward()
    reference = student.clone().requires_grad_()
    attention_similarity(reference, teacher, row_mask).backward()
    assert torch.allclose(tiny.grad.double() * 1e-25, reference.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("kind", "similarity"), KINDS)
def test_a_batch_without_images_gives_zero_with_a_graph(kind, similarity):
    for columns in (0, 3):
        student = torch.zeros(2, 4, columns, requires_grad=True)
        rows = torch.zeros(2, 4, dtype=torch.bool)
        loss = attention_distillation_loss(student, torch.zeros(2, 4, columns), rows, kind, similarity)
        loss.backward()
        assert loss.item() == 0 and (student.grad == 0).all()


def test_no_gradient_reaches_the_teacher():
    student, teacher, row_mask, _ = make_maps()
    teacher.requires_grad_()
    attention_distillation_loss(student.requires_grad_(), teacher, row_mask).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kind="l1"), r"\['cosine', 'mse', 'kl'\].*'l1'"),
        (dict(similarity="head"), "row"),
        (dict(reduction="sum"), "none"),
        (dict(kind="kl", similarity="matrix"), "rows"),
        (dict(row_mask=torch.ones(3, 7)), "bool"),
        (dict(row_mask=torch.ones(3, 6, dtype=torch.bool)), r"\[3, 7\]"),
        (dict(column_mask=torch.ones(3, 4, dtype=torch.bool)), r"\[3, 5\]"),
        (dict(row_weights=torch.ones(3, 6)), r"\[3, 7\], got torch.float32 \[3, 6\]"),
        (dict(row_weights=torch.ones(3, 7, dtype=torch.long)), "floating point"),
        (dict(row_weights=torch.ones(3, 7), similarity="matrix"), "use 'row'"),
        (dict(teacher_map=torch.rand(3, 7, 4)), r"\[3, 7, 4\] \(teacher\)"),
    ],
)
def test_attention_errors(change, message):
    student, teacher, row_mask, _ = make_maps()
    arguments = dict(student_map=student, teacher_map=teacher, row_mask=row_mask) | change
    with pytest.raises(ValueError, match=message):
        attention_distillation_loss(**arguments)


def test_answer_rows_are_shifted():
    x = IGNORE_INDEX
    labels = torch.tensor([[x, x, 7, 8, x, 9], [5, x, x, x, x, x], [x, x, x, x, 3, 4]])
    batch, row, target = answer_rows(labels)
    # The label 5 at position 0 is predicted by nothing; 9 is predicted at position 4, whose own label is ignored.
    assert batch.tolist() == [0, 0, 0, 2, 2]
    assert row.tolist() == [1, 2, 4, 3, 4]
    assert target.tolist() == [7, 8, 9, 3, 4]


def test_logit_distillation_by_hand():
    """One answer token, at position 2: the logits at position 1 decide, those at position 2 do not."""
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 1]])
    student, teacher = torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)
    teacher[0, 1, 0] = math.log(3.0)  # teacher (3/4, 1/4), student (1/2, 1/2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert logit_distillation_loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-6)
    teacher[0, 1, 0] = 0
    teacher[0, 2, 0] = math.log(3.0)  # the position of the answer token itself: an unshifted loss would count it
    assert logit_distillation_loss(student, teacher, labels).item() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocab_size", [None, 6])
def test_logit_distillation_against_loops(temperature, vocab_size):
    torch.manual_seed(0)
    student = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 6, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 8, (2, 6))
    labels[torch.rand(2, 6) < 0.4] = IGNORE_INDEX
    common, total, count = vocab_size or 8, 0.0, 0
    for b in range(2):
        for i in range(5):
            if labels[b, i + 1] != IGNORE_INDEX:
                p, q = (np.exp(z[b, i, :common].detach().numpy() / temperature) for z in (teacher, student))
                p, q = p / p.sum(), q / q.sum()
                total, count = total + (p * np.log(p / q)).sum() * temperature**2, count + 1
    assert count > 2
    loss = logit_distillation_loss(student, teacher, labels, temperature, vocab_size)
    assert loss.item() == pytest.approx(total / count, rel=1e-12)
    loss.backward()
    assert teacher.grad is None
    used = (student.grad != 0).any(-1)
    assert torch.equal(used[:, :-1], labels[:, 1:] != IGNORE_INDEX) and not used[:, -1].any()
    assert (student.grad[..., common:] == 0).all()
    assert torch.autograd.gradcheck(
        lambda s: logit_distillation_loss(s, teacher, labels, temperature, vocab_size), student
    )
    # A gradient of one temperature is comparable with another's: identical models give zero at any.
    assert abs(logit_distillation_loss(student, student, labels, temperature).item()) < 1e-12


def test_logit_distillation_without_answers_and_errors():
    student, teacher = torch.randn(1, 3, 4, requires_grad=True), torch.randn(1, 3, 4)
    loss = logit_distillation_loss(student, teacher, torch.full((1, 3), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and (student.grad == 0).all()
    labels = torch.zeros(1, 3, dtype=torch.long)
    for arguments, message in [((0.0,), "temperature"), ((1.0, 5), r"\[1, 4\]"), ((1.0, 0), r"\[1, 4\]")]:
        with pytest.raises(ValueError, match=message):
            logit_distillation_loss(student, teacher, labels, *arguments)
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        logit_distillation_loss(student, teacher, labels[:, :2])
    with pytest.raises(ValueError, match="labels"):
        answer_rows(labels[0])
