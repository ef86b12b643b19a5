"""The parts of a teacher cache: likeliest tokens in the loss, bits, shards, sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llava_compodistill.errors import CacheError
from llava_compodistill.hosts.base import IGNORE_INDEX, MergedBatch
from llava_compodistill.ops.answer_loss import answer_loss
from llava_compodistill.ops.answer_loss.top_tokens import TopTokens, top_tokens
from llava_compodistill.record.forward import Pass
from llava_compodistill.record.head import HeadRows
from llava_compodistill.train.cache import entries, quantise, shards, size
from llava_compodistill.train.facts import answer_tokens

pytestmark = pytest.mark.once
ROWS, VOCAB, COMMON = 7, 23, 20


def models(dtype=torch.float64, seed=0):
    """hidden [R, D_S], head [V, D_S] of a student; the same of a teacher; labels."""
    torch.manual_seed(seed)
    student = torch.randn(ROWS, 5, dtype=dtype), torch.randn(VOCAB, 5, dtype=dtype)
    teacher = torch.randn(ROWS, 6, dtype=dtype), 2 * torch.randn(VOCAB, 6, dtype=dtype)
    return student, teacher, torch.randint(0, COMMON, (ROWS,))


def losses(student, labels, dtype=torch.float64, **options):
    """(loss, lm, kl, gradients of hidden states and head)."""
    hidden, head = (part.to(dtype).requires_grad_() for part in student)
    found = answer_loss(hidden, head, labels, vocab_size=COMMON, lm_weight=0.5, kl_weight=2.0, **options)
    found.loss.backward()
    return *(float(part) for part in found), hidden.grad, head.grad


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_all_tokens_are_the_whole_teacher(temperature, chunk_rows):
    student, teacher, labels = models()
    options = {"temperature": temperature, "chunk_rows": chunk_rows}
    expected = losses(student, labels, teacher_hidden=teacher[0], teacher_head_weight=teacher[1], **options)
    top = top_tokens(*teacher, 100, temperature=temperature, vocab_size=COMMON, chunk_rows=chunk_rows)
    assert top.tokens.shape == (ROWS, COMMON)
    found = losses(student, labels, teacher_top=top, **options)
    assert found[:3] == pytest.approx(expected[:3], rel=1e-12)
    for mine, theirs in zip(found[3:], expected[3:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_k_tokens_and_the_rest_have_the_divergence_of_k_plus_one_outcomes(temperature):
    """Loss and gradient against autograd on the formula, in float64."""
    student, teacher, labels = models()
    top = top_tokens(*teacher, 4, temperature=temperature, vocab_size=COMMON)
    p = F.softmax(teacher[0] @ teacher[1][:COMMON].T / temperature, dim=1)
    torch.testing.assert_close(top.log_probs.exp(), p.topk(4).values)
    torch.testing.assert_close(top.rest.exp(), 1 - p.topk(4).values.sum(dim=1))
    hidden, head = (part.clone().requires_grad_() for part in student)
    logits = hidden @ head.T
    q = F.softmax(logits[:, :COMMON] / temperature, dim=1)
    kept = q.gather(1, top.tokens)
    outcomes = torch.cat([kept, 1 - kept.sum(dim=1, keepdim=True)], dim=1)
    target = torch.cat([top.log_probs, top.rest[:, None]], dim=1).exp()
    kl = temperature**2 * (target * (target.log() - outcomes.log())).sum()
    lm = F.cross_entropy(logits, labels, reduction="sum")
    (0.5 * lm + 2.0 * kl).backward()
    found = losses(student, labels, teacher_top=top, temperature=temperature)
    assert found[1:3] == pytest.approx((lm.item(), kl.item()), rel=1e-12)
    for mine, theirs in zip(found[3:], (hidden.grad, head.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [4, COMMON])
def test_a_16_bit_head_in_several_chunks(k):
    """Its gradient is made by blocks of the vocabulary, from the same targets."""
    student, teacher, labels = models()
    student = tuple(part.bfloat16() for part in student)
    top = top_tokens(*(part.float() for part in teacher), k, vocab_size=COMMON)
    expected = losses(student, labels, teacher_top=top, dtype=torch.float32)
    found = losses(student, labels, teacher_top=top, dtype=torch.bfloat16, chunk_rows=3)
    assert found[:3] == pytest.approx(expected[:3], rel=2e-2)
    for mine, theirs in zip(found[3:], expected[3:], strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=0.1, atol=0.05)


def test_a_student_equal_to_the_teacher_pays_nothing():
    _, teacher, labels = models()
    for k in (1, 4, COMMON):
        top = top_tokens(*teacher, k, vocab_size=COMMON)
        found = losses(teacher, labels, teacher_top=top)
        assert found[2] == pytest.approx(0, abs=1e-10)


def test_bad_tokens_are_refused():
    student, teacher, labels = models()
    top = top_tokens(*teacher, 4, vocab_size=COMMON)
    for broken, message in [
        (top._replace(tokens=top.tokens + COMMON), r"must lie in \[0, 20\)"),
        (top._replace(rest=top.rest[:3]), "with R = 7"),
        (top._replace(tokens=top.tokens.float()), "int64 tokens"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            losses(student, labels, teacher_top=broken)
    with pytest.raises(ValueError, match="one or the other"):
        losses(student, labels, teacher_top=top, teacher_hidden=teacher[0], teacher_head_weight=teacher[1])
    with pytest.raises(ValueError, match="k must be at least 1"):
        top_tokens(*teacher, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Bits
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", quantise.LOGIT_BITS)
def test_log_probabilities_keep_their_ends_and_err_by_half_a_step(bits):
    values = F.log_softmax(5 * torch.randn(50, 9), dim=1).sort(dim=1, descending=True).values
    codes, ends = quantise.quantise_log_probs(values, bits)
    found = quantise.restore_log_probs(codes, ends, bits)
    if bits == 32:
        assert torch.equal(found, values)
        return
    span = values[:, :1] - values[:, -1:]
    assert bool(((found - values).abs() <= span / (2 * quantise.levels(bits)) + 1e-5).all())
    assert (found - values).abs().max() > 1e-7
    torch.testing.assert_close(found[:, [0, -1]], values[:, [0, -1]])
    log_probs, rest = quantise.renormalise(found, torch.full((50,), -3.0))
    torch.testing.assert_close(log_probs.exp().sum(dim=1) + rest.exp(), torch.ones(50))


@pytest.mark.parametrize("bits", quantise.MAP_BITS)
def test_maps_keep_zeros_and_peaks_and_err_within_their_bound(bits):
    values = torch.softmax(3 * torch.randn(40, 30), dim=1).tril()
    codes, peaks = quantise.quantise_map(values, bits)
    found = quantise.restore_map(codes, peaks, bits)
    if bits == 32:
        assert torch.equal(found, values)
        return
    top, steps = values.amax(dim=1, keepdim=True), quantise.levels(bits)
    bound = (values * top).sqrt() / steps + top / (4 * steps**2)
    assert bool(((found - values).abs() <= bound + 1e-7).all())
    assert torch.equal(found == 0, (found == 0) | (values == 0))
    torch.testing.assert_close(found.amax(dim=1), values.amax(dim=1))
    cosine = F.cosine_similarity(found, values, dim=1)
    assert cosine.min() > {4: 0.99, 8: 0.9999, 16: 0.999999}[bits]


@pytest.mark.parametrize("bits", quantise.MAP_BITS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [0, 1, 77])
def test_codes_are_packed_and_unpacked(bits, share, count):
    generator = np.random.default_rng(0)
    kind = np.float32 if bits == 32 else np.int64
    codes = (1 + generator.integers(0, 15, count)).astype(kind) * (generator.random(count) < share)
    mask, stored = quantise.packed(codes, bits)
    assert np.array_equal(quantise.unpacked(mask, stored, bits, count), codes)
    occupied = int((codes != 0).sum())
    assert mask.nbytes + stored.nbytes == quantise.dense_or_sparse_bytes(count, occupied, bits)


# ---------------------------------------------------------------------------------------------------------------------
# Entries: a pass, sample by sample, and back
# ---------------------------------------------------------------------------------------------------------------------
def a_pass(what: entries.What) -> tuple[Pass, list[dict]]:
    """Of three samples: an image at the front, none, an image in the middle; and the samples one by one."""
    torch.manual_seed(0)
    layouts, patches = ["Iqqaa", "qqqa", "qIaqa"], 4
    samples = []
    for layout in layouts:
        ids = torch.tensor([-200 if kind == "I" else 5 for kind in layout])
        labels = torch.tensor([7 if kind == "a" else IGNORE_INDEX for kind in layout])
        samples.append({"input_ids": ids, "labels": labels, "image": torch.rand(3, 2, 2)})
    alone = [entries.merged(sample, patches, None) for sample in samples]
    length = max(batch.labels.shape[1] for batch in alone)
    batch = MergedBatch(
        torch.full((3, length), IGNORE_INDEX), torch.zeros(3, length, dtype=torch.bool), torch.full((3, patches), -1)
    )
    for row, one in enumerate(alone):
        end, seen = one.labels.shape[1], one.visual_index.shape[1]
        batch.labels[row, :end], batch.real[row, :end] = one.labels[0], True
        batch.visual_index[row, :seen] = one.visual_index[0]
    found = Pass(batch)
    (_, _), teacher, _ = models(torch.float32)
    rows = int(batch.answer_mask().sum())
    head = torch.nn.Linear(6, VOCAB, bias=False)
    head.weight.data = teacher[1]
    found.head = {"answer": HeadRows(teacher[0][:rows], batch.answer_targets(), head, head.forward)}
    keys = batch.visual_index.where(batch.visual_index >= 0, length)
    visible = torch.arange(length)[None, :, None] >= keys[:, None, :]
    found.maps = {group: torch.rand(3, length, patches) * visible for group in what.groups}
    return found, samples


def what(**changes) -> entries.What:
    values = {"answers": True, "top_k": 4, "logit_bits": 32, "temperature": 1.0, "vocab": COMMON, "map_bits": 32}
    return entries.What(**{**values, "groups": ((1, 2), (3,)), **changes})


@pytest.mark.parametrize("rows", ["all", "answer"])
def test_an_exact_pass_comes_back_in_any_order(rows):
    held = what(rows=rows)
    found, _ = a_pass(held)
    made = entries.make_entries(found, held)
    order = [2, 0, 1]
    batch = MergedBatch(*(getattr(found.batch, name)[order] for name in ("labels", "real", "visual_index")))
    cached = entries.collate([entries.as_tensors(made[place], held) for place in order])
    assert not any(value.is_floating_point() for value in cached.values()), "DeepSpeed would round it"
    back = entries.read_pass(cached, batch, held)
    counted = found.batch.attention_rows(rows)[order]
    for group, attention in found.maps.items():
        assert torch.equal(back.maps[group], attention[order] * counted[:, :, None])
    counts = found.batch.answer_mask().sum(dim=1).tolist()
    head = found.head["answer"]
    top = top_tokens(head.hidden, head.head.weight, 4, vocab_size=COMMON)
    pieces = list(zip(*(part.split(counts) for part in top), strict=True))
    expected = TopTokens(*(torch.cat(part) for part in zip(*(pieces[place] for place in order), strict=True)))
    assert torch.equal(back.top.top.tokens, expected.tokens)
    torch.testing.assert_close(back.top.top.log_probs, expected.log_probs)
    torch.testing.assert_close(back.top.top.rest, expected.rest)
    assert torch.equal(back.top.targets, batch.answer_targets())


@pytest.mark.parametrize(("logit_bits", "map_bits"), [(8, 4), (8, 8), (16, 16)])
def test_a_pass_in_fewer_bits_is_close(logit_bits, map_bits):
    held = what(logit_bits=logit_bits, map_bits=map_bits, vocab=COMMON)
    found, _ = a_pass(held)
    made = entries.make_entries(found, held)
    back = entries.read_pass(entries.collate([entries.as_tensors(e, held) for e in made]), found.batch, held)
    counted = found.batch.attention_rows()[:, :, None]
    for group, attention in found.maps.items():
        torch.testing.assert_close(
            back.maps[group], attention * counted, rtol=0, atol={4: 0.07, 8: 5e-3, 16: 2e-5}[map_bits]
        )


def test_a_large_vocabulary_takes_three_bytes_a_token():
    tokens = np.array([0, 1, 65_535, 65_536, 151_935])
    found = entries._narrow_tokens(tokens, 151_936)
    assert found["top.tokens"].nbytes + found["top.high"].nbytes == 5 * entries.token_bytes(151_936)
    entry = {
        **found,
        "sizes": np.array([5, 0, 0]),
        **{name: np.zeros(5, np.float32) for name in ("top.codes", "top.ends", "top.rest")},
    }
    held = what(groups=(), top_k=1, vocab=151_936)
    assert entries.as_tensors(entry, held)["top.tokens"].tolist() == tokens.tolist()


def test_values_that_are_not_finite_are_refused():
    held = what()
    found, _ = a_pass(held)
    found.maps[(3,)][0, 5, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"maps of the layers \[3\]"):
        entries.make_entries(found, held)


def test_digests_are_of_what_is_read():
    _, (sample, text, _) = a_pass(what())
    same = entries.digests({name: value.clone() for name, value in sample.items()})
    first = entries.digests(sample)
    assert all(bytes(first[name]) == bytes(same[name]) for name in first)
    brighter = entries.digests({**sample, "image": sample["image"] + 1e-6})
    assert bytes(brighter["digest.text"]) == bytes(first["digest.text"])
    assert bytes(brighter["digest.pixels"]) != bytes(first["digest.pixels"])
    relabelled = entries.digests({**sample, "labels": sample["labels"].masked_fill(sample["labels"] == 7, 8)})
    assert bytes(relabelled["digest.text"]) != bytes(first["digest.text"])
    # The stand-in for an image that LLaVA's data set gives a sample of text is read by nobody.
    blank = entries.digests({**text, "image": torch.zeros(3, 9, 9)})
    assert bytes(blank["digest.pixels"]) == bytes(entries.digests(text)["digest.pixels"])


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes", [{}, {"logit_bits": 8, "map_bits": 8}, {"map_bits": 4}, {"rows": "answer"}, {"groups": ()}]
)
def test_the_size_that_is_told_is_the_size_that_is_made(changes, tmp_path):
    """Of maps without zeros but those of a causal model it is exact; the header of a shard comes on top."""
    held = what(**changes)
    found, samples = a_pass(held)
    for attention in found.maps.values():
        attention.masked_fill_(attention > 0, 0.5)
    made = [{**e, **entries.digests(s)} for e, s in zip(entries.make_entries(found, held), samples, strict=True)]
    lengths = [size.Lengths.of(sample, 4, None, ["all", "answer"]) for sample in samples]
    told = size.mean_bytes(lengths, held)
    parts = {"top": told.logits, "map": told.maps}
    for name, each in parts.items():
        stored = sum(array.nbytes for entry in made for part, array in entry.items() if part.startswith(name))
        assert stored == pytest.approx(3 * each, abs=1e-6), name
    path = shards.write_shard(tmp_path, 0, made)
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert path.stat().st_size - header <= 3 * told.total + 64


@pytest.mark.parametrize("limit", [None, 9, 7, 5])
def test_what_a_text_spells_of_padding_is_no_token(limit):
    """Neither of the cache's rows nor of what L_LM is divided by."""
    ids = torch.tensor([1, -200, 7, 3, 7, 5, 6, 7, 4])
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    batch = entries.merged({"input_ids": ids, "labels": labels}, 3, limit, pad=7)
    kept = [1, *[-200] * 3, 3, 5, 6, 4][:limit]
    assert batch.visual[0].tolist() == [token == -200 for token in kept]
    count = sum(token in (3, 5, 6, 4) for token in kept)
    padded = {"input_ids": ids[None], "labels": labels[None], "attention_mask": ids[None] != 7}
    assert int(batch.answer_mask().sum()) == count == int(answer_tokens(padded, 3, limit))


def test_the_sizes_in_the_guide():
    """scripts/README.md, of the paper's tower and pair."""
    guide = (Path(__file__).parents[1] / "scripts" / "README.md").read_text(encoding="utf-8")

    def of(question: int, answer: int, **changes) -> float:
        ids = torch.full((1 + question + answer,), 5)
        ids[0] = -200
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[1 + question :] = 5
        length = size.Lengths.of({"input_ids": ids, "labels": labels}, 729, 2048, ["all", "answer"])
        values = {"vocab": 151_646, "top_k": 64, "logit_bits": 8, "map_bits": 8, **changes}
        return size.bytes_of(length, what(**values)).total

    groups = tuple((layer,) for layer in range(9))
    rows = [
        ("5.5 kB | 3.1 GB", of(0, 20, groups=()), 558e3),
        ("40 kB | 27 GB", of(150, 150, groups=()), 665e3),
        ("0.54 MB | 0.36 TB", of(150, 150, groups=groups, rows="answer", map_bits=4), 665e3),
        ("1.0 MB | 0.69 TB", of(150, 150, groups=groups, rows="answer"), 665e3),
        ("3.1 MB | 2.1 TB", of(150, 150, groups=groups, map_bits=4), 665e3),
        ("5.3 MB | 3.5 TB", of(150, 150, groups=groups), 665e3),
        ("18 MB | 12 TB", of(150, 150, groups=groups, map_bits=32), 665e3),
    ]
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    for text, each, samples in rows:
        assert f"| {text} |" in guide, text
        for told, found in zip(text.split(" | "), (each, each * samples), strict=True):
            number, unit = told.split()
            assert float(number) * units[unit] == pytest.approx(found, rel=0.03), text


def test_other_options_are_told_with_their_size():
    held = what(logit_bits=8, map_bits=8)
    lengths = [size.Lengths(200, {"all": 1000, "answer": 200}, 729, {"all": 460_000, "answer": 145_800})]
    told = {name: size.mean_bytes(lengths, other).total for name, other in size.alternatives(held, ("all", "answer"))}
    mine = size.mean_bytes(lengths, held).total
    assert told["--map_bits 4"] < mine < told["--map_bits 32"]
    assert told["--attention_rows answer"] < mine / 2
    assert told["--vat False (no maps)"] < told["--attention_rows answer"]
    assert "--top_k 64" not in told, "the vocabulary has no more than 20 tokens"


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------
def some_entries(count: int) -> list[dict]:
    return [
        {
            "sizes": np.array([n, 0, 0], np.int64),
            "a": np.arange(n, dtype=np.uint8),
            **({"b": np.ones(2, np.float32)} if n % 2 else {}),
        }
        for n in range(count)
    ]


def test_a_shard_gives_back_its_samples(tmp_path):
    made = some_entries(5)
    path = shards.write_shard(tmp_path, 10, made)
    assert path.name == "00000010-00000015.safetensors" and list(tmp_path.iterdir()) == [path]
    shard = shards.Shard(path)
    assert shard.samples == 5
    for place in (4, 0, 3):
        found = shard.read(place)
        assert {name: value.tolist() for name, value in found.items() if value.size} == {
            name: value.tolist() for name, value in made[place].items() if value.size
        }
    assert shards.Shard(path, ["b", "c"]).read(3).keys() == {"b"}


def test_damage_is_found_and_named(tmp_path):
    first, second = (shards.write_shard(tmp_path, start, some_entries(5)) for start in (0, 5))
    shards.write_settings(tmp_path, {"a": 1})
    with pytest.raises(CacheError, match="not finished .*same `llava-compodistill cache` command again"):
        shards.read_index(tmp_path)
    shards.write_index(tmp_path, [(0, 5), (5, 10)])
    index = shards.read_index(tmp_path)
    assert [shards.damage(path, index[path.name]) for path in (first, second)] == [None, None]
    whole = second.read_bytes()
    second.write_bytes(whole[:-8])
    assert "bytes of" in shards.damage(second, index[second.name])
    assert "is damaged" in shards.damage(second, None), "before there is an index the file's header tells"
    second.write_bytes(whole[:-8] + bytes(8))
    assert "first or last" in shards.damage(second, index[second.name])
    second.unlink()
    assert shards.damage(second, index[second.name]) == "is missing"
    with pytest.raises(CacheError, match="holds no teacher cache"):
        shards.read_settings(tmp_path / "..")
    (tmp_path / shards.SETTINGS_FILE).write_text('{"format": 99, "settings": {}}')
    with pytest.raises(CacheError, match="format 99, and this release reads 2"):
        shards.read_settings(tmp_path)


def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path, monkeypatch):
    def refuse(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", refuse)
    with pytest.raises(OSError, match="No space left"):
        shards.write_shard(tmp_path, 0, some_entries(3))
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_clears_leftovers_does_not_stop_another(tmp_path, monkeypatch):
    """It may begin when the first rank has ended and others write their last shard."""
    original, cleared = shards.manifest.sync, []

    def clear_once(path):
        if path.suffix == ".tmp" and not cleared:
            cleared.append(path)
            path.unlink()
        original(path)

    monkeypatch.setattr(shards.manifest, "sync", clear_once)
    path = shards.write_shard(tmp_path, 0, some_entries(3))
    assert cleared and [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert shards.Shard(path).samples == 3
