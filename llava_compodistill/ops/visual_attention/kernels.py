"""Triton kernels of the visual attention map. Launched by `fused.py`, which holds the formulas and the memory layout.

Keys are reached through two ascending lists of positions for each sample: the visual keys, in the order of the map's
columns, and the other visible keys. Hidden keys are in neither, so that no kernel needs the key mask. A row sees the
first `*_before[row]` entries of each list; unused entries hold N, which is after every row.

Scores and log-sum-exps are in units of log2: P = exp2(scale * log2(e) * q.k - lse). `lse` is +inf for rows that are
not computed, which makes their P 0. Sums over heads and over tiles run inside one program, in a fixed order.

Offsets that grow with B, H or N are 64 bit: a map of 8 x 32 heads x 4096 x 2048 has more than 2**31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

# `do_not_specialize`: lengths differ from batch to batch, and no kernel should be compiled again for a multiple of 16.


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    """a @ b in float32; without TF32 for float32 operands."""
    if WIDE:  # the interpreter cannot multiply bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _extend_lse(
    largest, total, q, rows, key, stride_kn, positions, count, length, scale,
    D: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The running maximum and sum [ROWS] after `count` more keys of a list."""
    dims = tl.arange(0, D)
    for start in range(0, count, COLUMNS):
        slots = start + tl.arange(0, COLUMNS)
        place = tl.load(positions + slots, mask=slots < count, other=length)
        k = tl.load(
            key + place.to(tl.int64)[None, :] * stride_kn + dims[:, None], mask=place[None, :] < length, other=0
        )
        scores = tl.where(place[None, :] <= rows[:, None], _dot(q, k, WIDE) * scale, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(scores - new[:, None]), 1)
        largest = new
    return largest, total


@triton.jit(do_not_specialize=["length"])
def lse_kernel(
    query, key, lse, visual, visual_before, other, other_before,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, heads, group, length, num_visual, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """lse [B, H, N] of every row over all visible keys. Grid: heads, row tiles (longest first), samples."""
    head = tl.program_id(0).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    sample = tl.program_id(2).to(tl.int64)
    rows = first + tl.arange(0, ROWS)
    lse += (sample * heads + head) * length

    last = sample * length + tl.minimum(first + ROWS, length) - 1
    visual_count = tl.load(visual_before + last)
    other_count = tl.load(other_before + last)
    # Rows before the first visual key are nobody's business.
    other_count = tl.where(visual_count > 0, other_count, 0)

    key += sample * stride_kb + head // group * stride_kh
    q = tl.load(
        query
        + sample * stride_qb
        + head * stride_qh
        + rows.to(tl.int64)[:, None] * stride_qn
        + tl.arange(0, D)[None, :],
        mask=rows[:, None] < length,
        other=0,
    )
    # A finite start: a row that sees no key must not become inf - inf.
    largest = tl.full([ROWS], -3.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    largest, total = _extend_lse(
        largest, total, q, rows, key, stride_kn, visual + sample * num_visual, visual_count, length, scale,
        D, COLUMNS, WIDE,
    )  # fmt: skip
    largest, total = _extend_lse(
        largest, total, q, rows, key, stride_kn, other + sample * length, other_count, length, scale,
        D, COLUMNS, WIDE,
    )  # fmt: skip
    value = tl.where(total > 0, largest + tl.log2(total), float("inf"))
    # A NaN score must come out as NaN, not as a row that sees nothing.
    value = tl.where(total == total, value, total)
    tl.store(lse + rows, value, mask=rows < length)


@triton.jit(do_not_specialize=["length"])
def map_kernel(
    query, key, lse, out, visual,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, heads, group, length, num_visual, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MEAN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of the map: [B, N, N_v] (MEAN) or [B, H, N, N_v]. Grid: column tiles, row tiles, samples (x heads).

    For the mean over heads one program goes through all heads and writes its tile once.
    """
    first_slot = tl.program_id(0) * COLUMNS
    first = tl.program_id(1) * ROWS
    plane = tl.program_id(2).to(tl.int64)
    sample = plane if MEAN else plane // heads
    rows = first + tl.arange(0, ROWS)
    slots = first_slot + tl.arange(0, COLUMNS)
    dims = tl.arange(0, D)

    visual += sample * num_visual
    place = tl.load(visual + slots, mask=slots < num_visual, other=length)
    # Nothing to compute where even the tile's first key comes after its last row (or is padding).
    count = tl.where(tl.load(visual + first_slot) < tl.minimum(first + ROWS, length), heads if MEAN else 1, 0)
    first_head = tl.full([], 0, tl.int64) if MEAN else plane % heads

    query += sample * stride_qb + rows.to(tl.int64)[:, None] * stride_qn + dims[None, :]
    key += sample * stride_kb + place.to(tl.int64)[None, :] * stride_kn + dims[:, None]
    lse += sample * heads * length
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, count):
        head = first_head + step
        q = tl.load(query + head * stride_qh, mask=rows[:, None] < length, other=0)
        k = tl.load(key + head // group * stride_kh, mask=place[None, :] < length, other=0)
        row_lse = tl.load(lse + head * length + rows, mask=rows < length, other=float("inf"))
        total += tl.exp2(_dot(q, k, WIDE) * scale - row_lse[:, None])
    if MEAN:
        total /= heads
    # Keys after the row may have overflowed; they are discarded here, once for all heads.
    total = tl.where(place[None, :] <= rows[:, None], total, 0.0)
    out += plane * length * num_visual + rows.to(tl.int64)[:, None] * num_visual + slots[None, :]
    tl.store(out, total, mask=(rows[:, None] < length) & (slots[None, :] < num_visual))


@triton.jit
def _delta(
    q, rows, lse, key, stride_kn, grad, positions, count, length, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """D [ROWS] = sum over the visual keys of P * gradient. `grad` points at the rows of the gradient."""
    dims = tl.arange(0, D)
    delta = tl.zeros([ROWS], tl.float32)
    for start in range(0, count, COLUMNS):
        slots = start + tl.arange(0, COLUMNS)
        place = tl.load(positions + slots, mask=slots < count, other=length)
        k = tl.load(
            key + place.to(tl.int64)[None, :] * stride_kn + dims[:, None], mask=place[None, :] < length, other=0
        )
        g = tl.load(grad + slots[None, :], mask=(rows[:, None] < length) & (slots[None, :] < count), other=0)
        probs = tl.exp2(_dot(q, k, WIDE) * scale - lse[:, None])
        delta += tl.sum(tl.where(place[None, :] <= rows[:, None], probs * g, 0.0), 1)
    return delta


@triton.jit
def _extend_grad_query(
    total, q, rows, lse, delta, key, stride_kn, grad, positions, count, length, scale,
    VISUAL: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """total [ROWS, D] + dS k over `count` keys of a list; the gradient is 0 off the visual keys."""
    dims = tl.arange(0, D)
    for start in range(0, count, COLUMNS):
        slots = start + tl.arange(0, COLUMNS)
        place = tl.load(positions + slots, mask=slots < count, other=length)
        k = tl.load(
            key + place.to(tl.int64)[:, None] * stride_kn + dims[None, :], mask=place[:, None] < length, other=0
        )
        probs = tl.exp2(_dot(q, tl.trans(k), WIDE) * scale - lse[:, None])
        if VISUAL:
            g = tl.load(grad + slots[None, :], mask=(rows[:, None] < length) & (slots[None, :] < count), other=0)
            grad_scores = probs * (g - delta[:, None])
        else:
            grad_scores = probs * -delta[:, None]
        grad_scores = tl.where(place[None, :] <= rows[:, None], grad_scores, 0.0)
        total += _dot(grad_scores.to(k.dtype), k, WIDE)
    return total


@triton.jit(do_not_specialize=["length", "row_tiles"])
def grad_query_kernel(
    query, key, lse, delta, grad, grad_query, visual, visual_before, other, other_before, active_before, shift,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_gb, stride_gh, stride_gn,
    stride_ob, stride_oh, stride_on, heads, group, length, num_visual, scale, factor, row_tiles,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, NEED_QUERY: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """delta [B, H, N] (the D of the formulas) and the gradient of the query. Grid: heads, row tiles, samples.

    Tiles of rows without a gradient are left as they are. `active_before` [B, row_tiles + 1] counts, in tiles of TILE
    rows, those that have one. `shift` [B] keeps float16 products in range (`fused.py`).
    """
    head = tl.program_id(0).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    active_before += sample * (row_tiles + 1)
    begin = tl.load(active_before + tile * (ROWS // TILE))
    end = tl.load(active_before + tl.minimum((tile + 1) * (ROWS // TILE), row_tiles))
    if begin == end:
        return

    first = tile * ROWS
    rows = first + tl.arange(0, ROWS)
    wide_rows = rows.to(tl.int64)
    inside = rows < length
    dims = tl.arange(0, D)
    plane = (sample * heads + head) * length
    key += sample * stride_kb + head // group * stride_kh
    query += sample * stride_qb + head * stride_qh
    grad += sample * stride_gb + head * stride_gh + wide_rows[:, None] * stride_gn
    visual += sample * num_visual
    last = sample * length + tl.minimum(first + ROWS, length) - 1
    visual_count = tl.load(visual_before + last)

    q = tl.load(query + wide_rows[:, None] * stride_qn + dims[None, :], mask=inside[:, None], other=0)
    row_lse = tl.load(lse + plane + rows, mask=inside, other=float("inf"))
    row_delta = _delta(
        q, rows, row_lse, key, stride_kn, grad, visual, visual_count, length, scale, ROWS, COLUMNS, D, WIDE
    )
    tl.store(delta + plane + rows, row_delta, mask=inside)
    if NEED_QUERY:
        up = tl.load(shift + sample)
        row_lse -= up
        total = tl.zeros([ROWS, D], tl.float32)
        total = _extend_grad_query(
            total, q, rows, row_lse, row_delta, key, stride_kn, grad, visual, visual_count, length, scale,
            True, D, COLUMNS, WIDE,
        )  # fmt: skip
        total = _extend_grad_query(
            total, q, rows, row_lse, row_delta, key, stride_kn, grad, other + sample * length,
            tl.load(other_before + last), length, scale, False, D, COLUMNS, WIDE,
        )  # fmt: skip
        total *= factor * tl.exp2(-up)
        grad_query += sample * stride_ob + head * stride_oh + wide_rows[:, None] * stride_on + dims[None, :]
        tl.store(grad_query, total.to(grad_query.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["length", "capacity", "row_tiles"])
def grad_key_kernel(
    query, key, lse, delta, grad, grad_key, positions, before, active, active_before, shift,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_gb, stride_gh, stride_gn,
    stride_ob, stride_oh, stride_on, heads, group, length, capacity, scale, factor, row_tiles,
    VISUAL: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of the keys of one list [B, capacity]. Grid: key heads, tiles of the list, samples.

    Everything is transposed, [COLUMNS, TILE]: the product with the query then reads dS from registers. A program adds
    up the query heads of its key head. `active` [B, row_tiles] lists the tiles of rows that have a gradient.
    """
    kv_head = tl.program_id(0).to(tl.int64)
    first_slot = tl.program_id(1) * COLUMNS
    sample = tl.program_id(2).to(tl.int64)
    positions += sample * capacity
    count = tl.load(before + sample * length + length - 1)
    if first_slot >= count:
        return

    slots = first_slot + tl.arange(0, COLUMNS)
    place = tl.load(positions + slots, mask=slots < count, other=length)
    listed = place < length
    dims = tl.arange(0, D)
    key += sample * stride_kb + kv_head * stride_kh
    k = tl.load(key + place.to(tl.int64)[:, None] * stride_kn + dims[None, :], mask=listed[:, None], other=0)

    # Rows before the tile's first key cannot see it.
    active += sample * row_tiles
    active_before += sample * (row_tiles + 1)
    begin = tl.load(active_before + tl.load(positions + first_slot) // TILE)
    end = tl.load(active_before + row_tiles)
    up = tl.load(shift + sample)
    total = tl.zeros([COLUMNS, D], tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        head_query = query + sample * stride_qb + head * stride_qh
        head_grad = grad + sample * stride_gb + head * stride_gh
        plane = (sample * heads + head) * length
        for step in range(begin, end):
            rows = tl.load(active + step) * TILE + tl.arange(0, TILE)
            wide_rows = rows.to(tl.int64)
            inside = rows < length
            q = tl.load(head_query + wide_rows[:, None] * stride_qn + dims[None, :], mask=inside[:, None], other=0)
            row_lse = tl.load(lse + plane + rows, mask=inside, other=float("inf"))
            row_delta = tl.load(delta + plane + rows, mask=inside, other=0)
            probs = tl.exp2(_dot(k, tl.trans(q), WIDE) * scale - (row_lse - up)[None, :])
            if VISUAL:
                g = tl.load(
                    head_grad + wide_rows[None, :] * stride_gn + slots[:, None],
                    mask=inside[None, :] & listed[:, None],
                    other=0,
                )
                grad_scores = probs * (g - row_delta[None, :])
            else:
                grad_scores = probs * -row_delta[None, :]
            grad_scores = tl.where(place[:, None] <= rows[None, :], grad_scores, 0.0)
            total += _dot(grad_scores.to(q.dtype), q, WIDE)
    total *= factor * tl.exp2(-up)
    grad_key += sample * stride_ob + kv_head * stride_oh + place.to(tl.int64)[:, None] * stride_on + dims[None, :]
    tl.store(grad_key, total.to(grad_key.dtype.element_ty), mask=listed[:, None])


INTERPRETED = not isinstance(lse_kernel, triton.JITFunction)
"""Whether Triton was imported under TRITON_INTERPRET=1: the kernels then run in Python, on any device."""
