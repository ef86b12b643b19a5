"""Packs and layers without padding: losses and gradients of the padded run, no sample lost or doubled."""

from __future__ import annotations

import json
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from checks import PLAIN, assert_same_log, assert_same_weights, killed_and_resumed, trained_weights
from factory import make_batch, make_model
from safetensors.torch import load_file

from llava_compodistill import compat
from llava_compodistill.errors import DataError, FlagError, SampleError
from llava_compodistill.hosts.llava.experts import Experts
from llava_compodistill.hosts.llava.language_models import upcycle
from llava_compodistill.hosts.llava.trained_towers import train_tower
from llava_compodistill.record.forward import EMBEDDINGS, Needs, record
from llava_compodistill.record.merge import record_merge
from llava_compodistill.record.padding import check_backend, is_flash
from llava_compodistill.train import packing
from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.checks import check_arguments
from llava_compodistill.train.data import CheckedDataset
from llava_compodistill.train.objective import Objective
from llava_compodistill.train.packing import PackCollator, PackedDataset, make_packs, merged_lengths
from llava_compodistill.train.preflight.lengths import Limits, Reading, packed_length
from scale import modes
from scale.matrix import SAME_NUMBERS

#: Several images, text before, between and after them, text alone, no answer, one token.
LAYOUTS = ["qIqqIqaaqa", "Iqa", "qqqaa", "qIqq", "a", "qIqaaaaaaqa"]


def arguments(folder, **changes) -> TrainingArguments:
    values = {"stage": "dft", "use_cpu": True, "report_to": "none", "student_layers": "0,2,3"}
    return TrainingArguments(str(folder), **{**values, "teacher_layers": "1,2,3,4,5", **changes})


def losses_and_gradients(student, teacher, args, padding_free, batch):
    """Of one micro-batch; a term's own weights among the gradients."""
    torch.manual_seed(3)  # the terms' own weights; what routers draw
    terms = args.chosen_method.terms(args.stage, args)
    layers = args.image_layers if args.image_layers == "all" else [int(args.image_layers)]
    objective = Objective(student, teacher, terms, 91, image_layers=layers, padding_free=padding_free)
    trained = dict(student.named_parameters())
    for name, module in objective.modules.items():
        module.to(next(student.parameters()).dtype)
        trained |= {f"{name}.{part}": weight for part, weight in module.named_parameters()}
    for weight in trained.values():
        weight.grad = None
    with objective.running():
        sums = objective(student, {**batch.inputs, "use_cache": False})
        sum(found.loss for found in sums.values() if found.loss is not None).backward()
    logged = {f"{term}.{name}": value for term, found in sums.items() for name, value in found.logged.items()}
    logged |= {f"{term}.{name}": value for term, found in sums.items() for name, (value, _) in found.measured.items()}
    return logged, {name: weight.grad for name, weight in trained.items() if weight.grad is not None}


def assert_same_step(student, teacher, args, batch, tolerance):
    (losses, gradients), (free, found) = (
        losses_and_gradients(student, teacher, args, padding_free, batch) for padding_free in (False, True)
    )
    assert losses and free.keys() == losses.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(free[name].item(), rel=tolerance, abs=1e-12), name
    assert gradients and gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        # Keys have no bias in their gradient but rounding: a softmax does not see it.
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name
    return losses


def make_pair(siglip, family="qwen2", attention="sdpa", **options):
    teacher = make_model(siglip, family, hidden=48, layers=6, heads=6, vocab=128, seed=1, attention=attention)
    student = make_model(siglip, family, seed=2, attention=attention, **options)
    return student.train(), teacher.requires_grad_(False)


@pytest.fixture
def masks_of_float64(monkeypatch):
    # transformers 4.37 fills masks of scores with float64's smallest number in torch's default dtype.
    monkeypatch.setattr(torch, "full", partial(torch.full, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# Layers without padding
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("masks_of_float64")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention, tolerance", [("sdpa", 1e-10), ("eager", 1e-5)])  # eager's softmax is float32
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_step_is_that_of_the_padded_batch(siglip, tmp_path, family, attention, tolerance, checkpointing):
    student, teacher = make_pair(siglip, family, attention)
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.enable_input_require_grads()
    losses = assert_same_step(student, teacher, arguments(tmp_path), make_batch(LAYOUTS), tolerance)
    assert losses["attention.attention"] > 0.01 and losses["answers.kl"] > 0.01


@pytest.mark.usefixtures("masks_of_float64")
@pytest.mark.parametrize(
    "method, changes",
    [
        ("kd", {}),
        ("llavadi", {}),  # hidden states
        ("align_kd", {}),  # single heads, and what the first layer receives
        ("llava_kd", {}),  # the heads at visual tokens
        ("switch_kd", {}),  # the teacher on the student's features
        ("switch_kd", {"gradient_checkpointing": True}),  # whose layers run again in the backward
        ("compodistill", {"visual_advantage": "both"}),  # the teacher without the image
        ("compodistill", {"attention_heads": "matched", "attention_loss": "kl", "attention_rows": "answer"}),
        ("sft", {"stage": "sft", "image_layers": "1"}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_every_kind_of_term_meets_what_it_asks_for(siglip, tmp_path, method, changes):
    student, teacher = make_pair(siglip, unfreeze_mm_vision_tower=method == "switch_kd")
    if method == "switch_kd":
        train_tower(student.get_vision_tower())
    args = arguments(tmp_path, method=method, **changes)
    if args.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.enable_input_require_grads()
    assert_same_step(student, None if method == "sft" else teacher, args, make_batch(LAYOUTS), 1e-5)


def test_attention_that_would_leave_its_sample_is_refused(siglip, tmp_path, world):
    model = make_model(siglip)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(
        ValueError, match="with --attn_implementation flex_attention samples would attend to each other"
    ):
        hidden_at_the_head(model, make_batch(LAYOUTS).inputs)
    with pytest.raises(FlagError, match="with --attn_implementation flex_attention samples would"):
        tiny.run(world, "sft", tmp_path / "out", padding_free=True, attn_implementation="flex_attention")
    for name in ("sdpa", "eager"):
        check_backend(name)
    # Where the package is missing, transformers takes a kernel from the hub, and its name.
    assert (
        is_flash("flash_attention_2") and is_flash("kernels-community/flash-attn2") and not is_flash("flex_attention")
    )


@pytest.mark.usefixtures("masks_of_float64")
def test_image_layers_in_eager_attention(siglip, tmp_path):
    student, _ = make_pair(siglip, attention="eager")
    args = arguments(tmp_path, method="sft", stage="sft", image_layers="1")
    assert_same_step(student, None, args, make_batch(LAYOUTS), 1e-5)


def test_experts_share_out_their_room_by_sample(siglip, tmp_path):
    student, teacher = make_pair(siglip)
    upcycle(student, Experts((0, 2)))
    args = arguments(tmp_path, method="llava_mod", stage="d2s")
    losses = assert_same_step(student, teacher, args, make_batch(LAYOUTS), 1e-5)
    assert losses["balance.balance"] > 1


def test_an_image_without_another_is_not_aligned_with_itself(siglip, tmp_path):
    """What --shuffle_attention_targets is the control of."""
    student, teacher = make_pair(siglip)
    args = arguments(tmp_path, shuffle_attention_targets=True)
    (alone, _), (two, _), (third, _) = (
        losses_and_gradients(student, teacher, args, True, make_batch(layouts))
        for layouts in (["qIqa", "qqqa"], ["qIqa", "qqqa", "qIqaa"], ["qIqa", "qIqaa"])
    )
    assert alone["attention.attention"] == 0 and alone["answers.kl"] > 0
    assert two["attention.attention"] > 0 and third["attention.attention"] > 0


def test_text_alone(siglip, tmp_path):
    student, teacher = make_pair(siglip)
    assert_same_step(student, teacher, arguments(tmp_path), make_batch(["qqa", "qqqqaqa"]), 1e-10)


def hidden_at_the_head(model, batch):
    with torch.no_grad(), record(model, Needs(head=frozenset({"all"})), padding_free=True) as recorder:
        model(**batch, use_cache=False)
    return recorder.latest.head["all"].hidden.split(recorder.batch.counts("all"))


def test_samples_neither_see_nor_move_each_other(siglip):
    """Each is where it would be alone: its positions begin at 0."""
    model, batch = make_model(siglip), make_batch(LAYOUTS[:3])
    together = hidden_at_the_head(model, batch.inputs)
    changed = {**batch.inputs, "input_ids": batch.inputs["input_ids"].clone()}
    changed["input_ids"][0, 0] += 1
    for place, (mine, other) in enumerate(zip(together, hidden_at_the_head(model, changed), strict=True)):
        assert (mine - other).abs().max() < 1e-12 if place else (mine - other).abs().max() > 1e-3
    images = [range(2), range(2, 3), range(3, 4)]
    for place, used in enumerate(images):
        ids = batch.inputs["input_ids"][place : place + 1]
        count = int((ids != 0).sum())
        alone = {"input_ids": ids[:, :count], "labels": batch.inputs["labels"][place : place + 1, :count]}
        (found,) = hidden_at_the_head(model, {**alone, "images": batch.inputs["images"][list(used)]})
        torch.testing.assert_close(together[place], found, atol=1e-12, rtol=0)


@pytest.mark.usefixtures("masks_of_float64")
@pytest.mark.parametrize("padding", ["right", "left"])
def test_no_layer_meets_padding(siglip, padding):
    model = make_model(siglip, tokenizer_padding_side=padding)
    batch, seen = make_batch(LAYOUTS, padding=padding), []
    layers = model.get_model().layers
    handles = [
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)) for layer in layers
    ]
    needs = Needs(hidden=frozenset({(EMBEDDINGS, "all"), (1, "all"), (3, "text")}))
    kept = {}
    for padding_free in (False, True):
        with torch.no_grad(), record(model, needs, padding_free=padding_free) as recorder:
            model(**batch.inputs, use_cache=False)
        kept[padding_free] = recorder.latest.hidden
    for handle in handles:
        handle.remove()
    real = recorder.batch.real
    assert int(real.sum()) < real.numel() and seen[:4] == [(*real.shape, 32)] * 4
    assert seen[4:] == [(1, int(real.sum()), 32)] * 4
    for key, states in kept[False].items():
        torch.testing.assert_close(kept[True][key], states, atol=1e-5 if padding == "left" else 1e-12, rtol=0)


@pytest.mark.skipif(compat.ALL_ATTENTION_FUNCTIONS is None, reason="refused there, see below")
def test_flash_attention_is_told_where_samples_begin(siglip, tmp_path, monkeypatch):
    """A stand-in with FlashAttention's arguments: the kernel itself needs a GPU."""
    student, teacher = make_pair(siglip)
    batch, calls = make_batch(LAYOUTS), []
    expected, gradients = losses_and_gradients(student, teacher, arguments(tmp_path), False, batch)

    def flash(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
        assert attention_mask is None and query.shape[0] == 1
        ends = cu_seq_lens_q.tolist()
        assert ends[0] == 0 and ends[-1] == query.shape[2] and cu_seq_lens_q.dtype == torch.int32
        assert kwargs["cu_seq_lens_k"].tolist() == ends
        longest = max(stop - start for start, stop in zip(ends, ends[1:], strict=False))
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == longest
        calls.append(len(ends) - 1)
        group = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        parts = [
            F.scaled_dot_product_attention(
                *(part[:, :, start:stop] for part in (query, key, value)), is_causal=True, scale=scaling
            )
            for start, stop in zip(ends, ends[1:], strict=False)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2), None

    monkeypatch.setitem(compat.ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    # What calls SDPA above is no layer's SDPA.
    monkeypatch.setattr("llava_compodistill.record.padding._attending_by_sample", lambda *args: _nothing())
    for model in (student, teacher):
        model.config._attn_implementation = "flash_attention_2"
    found, others = losses_and_gradients(student, teacher, arguments(tmp_path), True, batch)
    assert calls == [len(LAYOUTS)] * 10, "six layers of the teacher, four of the student"
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-9
    )
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-9, name


def _nothing():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.usefixtures("masks_of_float64")
def test_a_sample_beyond_a_layers_window_is_refused(siglip):
    """Eager attention has the window in both generations."""
    model = make_model(siglip, "mistral", attention="eager", sliding_window=20)
    inputs = make_batch(["qIqa", "qqa"]).inputs  # 16 visual tokens and three others
    with record(model, Needs(), padding_free=True), torch.no_grad():
        model(**inputs, use_cache=False)
        with pytest.raises(ValueError, match="window of 20 tokens, and a sample has 22.*--model_max_length"):
            model(**make_batch(["qIqaaaa", "qqa"]).inputs, use_cache=False)


def test_the_embedding_is_called_once_a_batch(siglip):
    """Ranks with packs of different numbers of samples would gather its weights in different numbers of calls."""
    model, batch, calls = make_model(siglip), make_batch(LAYOUTS), []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: calls.append(output.shape)
    )
    kept = {}
    for padding_free in (False, True):
        calls.clear()
        with record(model, Needs(hidden=frozenset({(EMBEDDINGS, "text")})), padding_free=padding_free) as recorder:
            model(**batch.inputs, use_cache=False)
        states = recorder.latest.hidden[EMBEDDINGS, "text"]
        model.zero_grad()
        (states * torch.arange(states.numel(), dtype=states.dtype).view_as(states)).sum().backward()
        kept[padding_free] = states.detach(), model.get_input_embeddings().weight.grad
        assert len(calls) == (1 if padding_free else len(LAYOUTS))
    handle.remove()
    torch.testing.assert_close(kept[True], kept[False], atol=1e-12, rtol=1e-12)
    assert "embed_tokens" not in vars(model.get_model())


def test_a_merge_that_embeds_in_another_order_is_refused(siglip, monkeypatch):
    """The embeddings of one sample must not be taken for those of another."""
    model, batch = make_model(siglip), make_batch(LAYOUTS)
    merge = model.prepare_inputs_labels_for_multimodal

    def backwards(ids, *args):
        return merge(ids.flip(0), *args)

    monkeypatch.setattr(model, "prepare_inputs_labels_for_multimodal", backwards)
    with pytest.raises(RuntimeError, match="other tokens"), record(model, Needs(), padding_free=True):
        model(**batch.inputs, use_cache=False)


def test_nothing_stays(siglip):
    model, attend = make_model(siglip), F.scaled_dot_product_attention

    def hooks():
        return [
            (len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
            for module in model.modules()
        ]

    model(**make_batch(["qIa"]).inputs, use_cache=False)  # transformers 5 leaves hooks of its own at the first call
    before = hooks()
    with pytest.raises(ZeroDivisionError), record(model, Needs(), padding_free=True):
        model(**make_batch(LAYOUTS).inputs, use_cache=False)
        assert hooks() != before and F.scaled_dot_product_attention is attend
        raise ZeroDivisionError
    assert hooks() == before


# ---------------------------------------------------------------------------------------------------------------------
# Packs
# ---------------------------------------------------------------------------------------------------------------------
def lengths_like_mix665k(count, seed=0):
    """Most samples hold an image of 576 tokens and some text; some are long text alone."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.empty(count).log_normal_(4.9, 0.8, generator=generator)
    image = 576 * (torch.rand(count, generator=generator) < 0.94)
    return (text + image).long().clamp(1, 2048).tolist()


@pytest.mark.once
def test_no_sample_is_lost_or_doubled_and_packs_are_full():
    lengths = lengths_like_mix665k(20_000)
    packs = make_packs(lengths, 2048, seed=5)
    assert sorted(sample for pack in packs for sample in pack) == list(range(20_000))
    sums = [sum(lengths[sample] for sample in pack) for pack in packs]
    # Two or three samples with an image fill 2,048 tokens as they can; six fill 4,096 better.
    assert max(sums) <= 2048 and sum(sums) / len(sums) > 0.87 * 2048
    assert sum(lengths) / len(make_packs(lengths, 4096, seed=5)) > 0.93 * 4096
    assert make_packs(lengths, 2048, seed=5) == packs and make_packs(lengths, 2048, seed=6) != packs
    # By chance: what is packed together does not lie together in the file.
    apart = [abs(pack[0] - pack[1]) for pack in packs if len(pack) > 1]
    assert sum(apart) / len(apart) > 20_000 / 5


@pytest.mark.once
def test_long_samples_and_such_that_are_left_out():
    packs = make_packs([10, 25, 0, 4, 30, 6], 20, seed=0)
    assert sorted(map(sorted, packs)) == [[0, 3, 5], [1], [4]]
    assert make_packs([0, 0], 20, seed=0) == []


@pytest.mark.once
def test_what_is_padded_stays_bounded():
    """Short texts fill up a pack with a long sample, to whose length their embeddings and maps are padded."""
    lengths = lengths_like_mix665k(2_000) + torch.randint(20, 120, (4_000,)).tolist()
    packs = make_packs(lengths, 4096, seed=5)
    assert sorted(sample for pack in packs for sample in pack) == list(range(6_000))
    padded = [len(pack) * max(lengths[sample] for sample in pack) for pack in packs]
    assert 2 * 4096 < max(padded) <= 3 * 4096
    assert sum(lengths) > 0.8 * 4096 * len(packs)


@pytest.mark.once
def test_packs_of_what_can_be_read():
    class Samples:
        list_data_dict, paired = ["records"], False

        def usable(self, place):
            return None if place in (1, 3, 4) else {"place": place}

    data = PackedDataset(Samples(), [[2, 1], [3, 4], [0]])
    assert len(data) == 3 and [data.places(index) for index in range(3)] == [[2, 1], [3, 4], [0]]
    assert data[0] == [{"place": 2}], "without the one that cannot be used"
    assert data[1] == [{"place": 0}], "of the next pack"
    with pytest.raises(DataError, match="No sample"):
        PackedDataset(Samples(), [[1], [3, 4]])[1]
    collator = PackCollator(lambda samples: [sample["place"] for sample in samples])
    assert collator([data[0], data[2]]) == [2, 0] and collator([{"place": 7}]) == [7]


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
ONE_STEP = {**PLAIN, "max_steps": 1, "blind": "off"}


def test_an_optimizer_step_of_packs_is_that_of_its_samples(dft, caplog):
    """All samples in one step: in one batch, in one pack, and in as many micro-batches as there are packs."""
    whole, expected = dft("whole", per_device_train_batch_size=16, **ONE_STEP)
    with caplog.at_level(logging.INFO, "llava_compodistill"):
        single, one = dft("one", pack_length=4096, per_device_train_batch_size=1, **ONE_STEP)
    data = single.train_dataset
    assert len(data) == 1 and sorted(data.places(0)) == list(range(16)) and len(data[0]) == 16
    assert "16 samples in 1 packs" in caplog.text
    assert_same_log(one, expected)
    assert_same_weights(trained_weights(single.model), trained_weights(whole.model), 2e-6)

    # The lengths are those of the merge.
    batch = single.data_collator([data[0]])
    core = single.objective.pair.student
    with torch.no_grad(), record_merge(core) as recorder:
        core(**{name: batch[name] for name in ("input_ids", "labels", "attention_mask", "images")}, use_cache=False)
    tokens = sum(recorder.batch.counts("all"))
    assert f"{100 * tokens / 4096:.1f} % full" in caplog.text

    room = max(recorder.batch.counts("all")) * 2
    packs = -(-tokens // room) + 1
    several, log = dft(
        "several", pack_length=room, per_device_train_batch_size=1, gradient_accumulation_steps=packs, **ONE_STEP
    )
    found = [several.train_dataset.places(index) for index in range(len(several.train_dataset))]
    assert sorted(place for pack in found for place in pack) == list(range(16)) and 1 < len(found) <= packs
    assert_same_log(log, expected)
    assert_same_weights(trained_weights(several.model), trained_weights(whole.model), 2e-6)


def test_an_offloaded_teacher_gives_the_same(dft):
    options = {**PLAIN, "max_steps": 2, "pack_length": 200, "per_device_train_batch_size": 1}
    whole, expected = dft("whole", **options)
    offloaded, found = dft("offloaded", teacher_placement="offload", **options)
    assert_same_log(found, expected, 0)
    assert_same_weights(trained_weights(offloaded.model), trained_weights(whole.model), 0)


def test_a_resumed_run_equals_an_unbroken_one(dft, monkeypatch):
    options = {"max_steps": 4, "pack_length": 200, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
    unbroken, expected = dft("unbroken", **options)
    resumed, found = killed_and_resumed(dft, monkeypatch, **options)
    assert_same_log(found, expected, 1e-5)
    assert_same_weights(trained_weights(resumed.model), trained_weights(unbroken.model), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", ["ddp", *(pytest.param(mode, marks=pytest.mark.long) for mode in ("zero2", "zero3", "fsdp2"))]
)
def test_two_processes_give_the_losses_of_one(ranks, world, sharp_teacher, mixed, tmp_path, mode):
    if modes.missing(mode):
        pytest.skip(modes.missing(mode))

    def train(name, processes, code, **options):
        options = {**PLAIN, "max_steps": 3, "pack_length": 150, "per_device_train_batch_size": 1, **options}
        options |= {"student_layers": "1,2,3", "teacher_layers": "1,2,3,4", "mm_projector_type": "mlp2x_gelu"}
        pair = {"teacher_model_path": sharp_teacher, "data_path": mixed}
        flags = tiny.flags(world, "dft", tmp_path / name, **pair, **options)
        ranks.train_well(flags, processes, tmp_path / f"{name}.log", SAME_NUMBERS + code)
        return load_file(tmp_path / name / "model.safetensors"), tiny.read_log(tmp_path / name)

    one, expected = train("one", 1, "", gradient_accumulation_steps=2)
    two, log = train("two", 2, modes.prelude(mode), **modes.flags(mode, tmp_path))
    assert_same_log(log, expected, 2e-5)
    assert_same_weights(two, one, 1e-5)


def test_a_long_sample_is_named_and_trained_whole_and_a_bad_one_left_out(dft, mixed, tmp_path, caplog, monkeypatch):
    records = json.loads(mixed.read_text())[:4]
    records[1]["conversations"][-1]["value"] = "red and blue " * 30
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    options = {"data_path": path, "pack_length": 120, "per_device_train_batch_size": 1, **ONE_STEP}
    original = CheckedDataset.conversation

    def conversation(self, record):
        if record["id"] == "sample-2":
            raise SampleError("its text cannot be read")
        return original(self, record)

    monkeypatch.setattr(CheckedDataset, "conversation", conversation)
    with pytest.raises(DataError, match="sample 'sample-2'.*its text cannot be read. --bad_samples skip"):
        dft("error", **options)
    with caplog.at_level(logging.INFO, "llava_compodistill"):
        trainer, _ = dft("skip", bad_samples="skip", sight_steps=1, **{**options, "max_steps": 2, "blind": "warn"})
    data = trainer.train_dataset
    assert sorted(place for index in range(len(data)) for place in data.places(index)) == [0, 1, 3]
    assert "Skipped sample 'sample-2'" in caplog.text
    assert "1 samples are longer than --pack_length 120: sample 'sample-1'" in caplog.text
    longest = max(len(sample["input_ids"]) for index in range(len(data)) for sample in data[index])
    assert longest > 120


@pytest.mark.once
@pytest.mark.parametrize("paired", [False, True])
def test_ranks_share_the_lengths_which_are_cut_and_those_of_both_answers(monkeypatch, paired):
    class Samples(list):
        def pass_over(self, place, problem):
            passed.append((place, problem))

    samples = Samples(range(5))
    samples.paired = paired
    found = [Reading(0, 10), Reading(1, 700), Reading(2, problem="torn"), Reading(3, 40), Reading(4, 50)]
    passed, asked, shares = [], [], []

    def measure(reader, places, workers, flag):
        assert flag == "--dataloader_num_workers"
        asked.append(list(places))
        return [found[place] for place in places]

    def gather(mine):
        shares.extend(mine)
        return shares

    monkeypatch.setattr(packing, "Reader", lambda *args: None)
    monkeypatch.setattr(packing, "measure", measure)
    monkeypatch.setattr(packing, "gather_object", gather)
    for rank in (0, 1):
        args = SimpleNamespace(process_index=rank, world_size=2, dataloader_num_workers=0)
        lengths = merged_lengths(samples, Limits(16, 512), None, args)
    assert asked == [[0, 2, 4], [1, 3]] and passed == [(2, "torn"), (2, "torn")]
    assert lengths == [part * (1 + paired) for part in (10, 512, 0, 40, 50)]
    samples.name_of = "sample {}".format
    found[3] = Reading(3, problem="an error that ends training: KeyError: 'id'", fatal=True)
    with pytest.raises(DataError, match="sample 3: an error that ends training: KeyError"):
        merged_lengths(samples, Limits(16, 512), None, args)


@pytest.mark.once
def test_a_pack_has_room_for_the_model_whose_images_take_more():
    """The check reads a sample by the student's limits, training by those of both."""
    check, training = Limits(9, 100, 16, 107), Limits(16, 107, 16, 107)
    for images, text in ((0, 30), (1, 30), (2, 60), (3, 90)):
        mine, theirs = (Reading(0, text + images * tokens, images) for tokens in (9, 16))
        expected = min(text + images * 16, 107)
        assert packed_length(mine, check, False) == packed_length(theirs, training, False) == expected
        assert packed_length(mine, check, True) == 2 * expected
    assert packed_length(Reading(0, 500, 1), Limits(16, 107, 9, 100), False) == 107


def test_own_answers_are_packed(dft):
    options = {"on_policy": 1.0, "on_policy_max_tokens": 4, "pack_length": 300, "per_device_train_batch_size": 2}
    _, own = dft("own", **{**ONE_STEP, **options})
    assert own[0]["own_answers"] == 1.0 and own[0]["kl"] > 0


#: In both generations of transformers.
BY_LENGTH = (
    {"group_by_length": True}
    if "group_by_length" in TrainingArguments.__dataclass_fields__
    else {"train_sampling_strategy": "group_by_length"}
)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pack_length": -1}, "--pack_length -1: must be a number of tokens"),
        ({"pack_length": 64, "group_by_modality_length": True}, "set --group_by_modality_length False"),
        ({"pack_length": 64, **BY_LENGTH}, "leave --train_samp|set --group_by_length False"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_what_an_older_transformers_cannot_do_is_refused(tmp_path, monkeypatch, siglip):
    monkeypatch.setattr(compat, "ALL_ATTENTION_FUNCTIONS", None)
    args = arguments(tmp_path, padding_free=True)
    names = ("teacher_cache", "teacher_version", "unfreeze_mm_vision_tower", "mm_use_im_start_end")
    model = SimpleNamespace(
        **dict.fromkeys(names),
        teacher_model_path="t",
        vision_tower="v",
        taf_depth=1,
        attn_implementation="flash_attention_2",
    )
    with pytest.raises(ValueError, match="--attn_implementation sdpa"):
        check_arguments(model, SimpleNamespace(data_path="d"), args)
    model = make_model(siglip)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="--attn_implementation sdpa"), record(model, Needs(), padding_free=True):
        pass
    model.config._attn_implementation, model.config.rope_scaling = "sdpa", {"type": "dynamic", "factor": 2.0}
    with pytest.raises(ValueError, match="dynamic rope_scaling"), record(model, Needs(), padding_free=True):
        pass
