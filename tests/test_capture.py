"""Captured maps, and the whole objective, against the fp64 computation of reference.py."""

from __future__ import annotations

import pytest
import reference
import torch
from factory import PATCHES, encoder_features, make_batch, make_model, save_tower

from llava_compodistill.methods import find_method
from llava_compodistill.record.attention import (
    GroupMeans,
    as_multiplied,
    attention_modules,
    capture_visual_attention,
)
from llava_compodistill.record.merge import record_merge
from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.objective import Objective

# Text before, between and after images; two images; the image first and last; text only; unequal lengths.
LAYOUTS = ["qIqqIqaaqa", "Iqa", "qqqaa", "qqqqaaI"]
# transformers computes norms and rotary angles in fp32 whatever the model's precision.
ROUNDING = 5e-6


def precision(attention: str, padding: str = "right") -> torch.dtype:
    """fp64 where transformers can: its additive masks and its eager softmax are written for fp32 and below."""
    return torch.float64 if (attention, padding) == ("sdpa", "right") else torch.float32


def forward(model, batch, layers, **options):
    """(maps, merged batch, logits) of one forward with the layers tapped."""
    with record_merge(model) as recorder:
        with capture_visual_attention(model, layers, lambda: recorder.batch, **options) as capture:
            logits = model(**batch.inputs, use_cache=False).logits
        return dict(capture.maps), recorder.batch, logits


def merged_samples(batch, limit=None):
    return [reference.merge(ids, labels, image, PATCHES, limit) for ids, labels, image in batch.samples]


def weights_of(model):
    """Parameters by name in fp64, graph included, so that gradients with respect to the model's can be compared."""
    named = model.named_parameters(remove_duplicate=False)  # a tied head under both of its names
    return {name: p.double() for name, p in named if "vision_tower" not in name}


def close(found, expected, tolerance=ROUNDING):
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
def test_maps_of_the_model_equal_the_reference(siglip, family, attention, padding):
    dtype = precision(attention, padding)
    model = make_model(siglip, family, attention=attention, dtype=dtype, tokenizer_padding_side=padding)
    batch = make_batch(LAYOUTS, padding=padding, dtype=dtype)
    with torch.no_grad():
        means, merged, logits = forward(model, batch, [0, 2])
        heads, _, _ = forward(model, batch, [2], heads="all")
        features = encoder_features(model, batch.inputs["images"]).double()
        weights = weights_of(model)
        assert list(means) == [0, 2] and list(heads) == [2]
        assert means[0].std() > 1e-2, "attention as good as uniform: nothing is tested"
        for row, sample in enumerate(merged_samples(batch)):
            hidden, attention_maps = reference.run(weights, model.config, sample, features)
            real = merged.real[row]
            close(logits[row, real], hidden @ weights["lm_head.weight"].T, 2e-5)
            for layer in (0, 2):
                found = means[layer][row][real]
                close(found[:, : len(sample.visual)], reference.visual_map(attention_maps[layer], sample.visual))
                assert not found[:, len(sample.visual) :].any(), "columns that pad visual tokens hold zero"
            found = heads[2][row][:, real, : len(sample.visual)]
            close(found, attention_maps[2][:, :, sample.visual])


def test_maps_agree_with_the_models_own_attentions(siglip):
    """The second opinion: transformers' own eager probabilities."""
    model = make_model(siglip, attention="eager", dtype=torch.float32)
    batch = make_batch(LAYOUTS, dtype=torch.float32)
    with torch.no_grad():
        maps, merged, _ = forward(model, batch, [1, 3])
        with record_merge(model):
            own = model(**batch.inputs, use_cache=False, output_attentions=True).attentions
    for layer, found in maps.items():
        for row in range(len(LAYOUTS)):
            index = merged.visual_index[row][merged.visual_index[row] >= 0]
            real = merged.real[row]
            close(found[row, real, : len(index)], own[layer][row].double().mean(dim=0)[real][:, index], 1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tapping_changes_no_output_and_leaves_no_trace(siglip, attention):
    model = make_model(siglip, attention=attention, dtype=torch.float32)
    batch = make_batch(LAYOUTS, dtype=torch.float32)

    def state():
        return [{name: id(value) for name, value in vars(module).items()} for module in attention_modules(model)]

    before = state()
    with torch.no_grad():
        expected = model(**batch.inputs, use_cache=False).logits
        with record_merge(model) as recorder:
            untapped = model(**batch.inputs, use_cache=False).logits
            with capture_visual_attention(model, [1], lambda: recorder.batch):
                inside = state()
                tapped = model(**batch.inputs, use_cache=False).logits
        after = model(**batch.inputs, use_cache=False).logits
    assert [layer for layer, (old, new) in enumerate(zip(before, inside, strict=True)) if old != new] == [1]
    assert state() == before
    assert "prepare_inputs_labels_for_multimodal" not in vars(model)
    torch.testing.assert_close(tapped, untapped, rtol=0, atol=0)
    torch.testing.assert_close(after, expected, rtol=0, atol=0)


def test_a_tap_is_gone_after_an_error(siglip):
    model = make_model(siglip)
    batch = make_batch(["qIqa"])
    with pytest.raises(KeyError), capture_visual_attention(model, [1], lambda: {}["no batch"]), record_merge(model):
        model(**batch.inputs, use_cache=False)
    assert "forward" not in vars(attention_modules(model)[1])
    assert forward(model, batch, [1])[0][1].shape[-1] == PATCHES


def test_a_batch_without_images_gives_no_maps(siglip):
    model = make_model(siglip)
    maps, merged, _ = forward(model, make_batch(["qqa", "qaa"]), [1])
    assert maps == {} and merged.visual_index.shape == (2, 0)


def test_wrong_use_is_an_error(siglip):
    model = make_model(siglip)
    batch = make_batch(["qIqa"])
    with pytest.raises(ValueError, match="Layer 4: the model has layers 0 to 3"):
        forward(model, batch, [4])
    with record_merge(model) as recorder, capture_visual_attention(model, [1], lambda: recorder.batch):
        with pytest.raises(RuntimeError, match="recorded already"), record_merge(model):
            pass
        with pytest.raises(RuntimeError, match="tapped already"):
            with capture_visual_attention(model, [0, 1], lambda: recorder.batch):
                pass
        assert model(**batch.inputs, use_cache=False).logits.isfinite().all()  # the outer contexts still hold
        assert recorder.batch.visual_index.shape == (1, PATCHES)
    with record_merge(model) as recorder, capture_visual_attention(model, [1], lambda: recorder.batch):
        cache = model(**{**batch.inputs, "labels": None}, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="without a key/value cache"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimeError, match="No forward has run"):
        with record_merge(model) as recorder:
            recorder.batch  # noqa: B018


# ---------------------------------------------------------------------------------------------------------------------
# Gradient checkpointing
# ---------------------------------------------------------------------------------------------------------------------
def gradients(model, batch, layers):
    """Gradients of a loss on maps and logits, the taps open until the backward is done."""
    model.zero_grad()
    with record_merge(model) as recorder, capture_visual_attention(model, layers, lambda: recorder.batch) as capture:
        logits = model(**batch.inputs, use_cache=False).logits
        loss = logits.square().mean()
        for layer, attention in capture.maps.items():
            weight = torch.rand(attention.shape, generator=torch.Generator().manual_seed(layer), dtype=attention.dtype)
            loss = loss + (attention * weight).sum()
        recorded = {layer: id(attention) for layer, attention in capture.maps.items()}
        loss.backward()
        assert {layer: id(attention) for layer, attention in capture.maps.items()} == recorded, "recorded twice"
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradient_checkpointing_gives_the_same_gradients(siglip, family, attention):
    dtype = precision(attention)
    model = make_model(siglip, family, attention=attention, dtype=dtype).train()
    batch = make_batch(LAYOUTS, dtype=dtype)
    plain = gradients(model, batch, [1, 2])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    checkpointed = gradients(model, batch, [1, 2])
    assert plain.keys() == checkpointed.keys()
    assert plain["model.layers.0.self_attn.q_proj.weight"].norm() > 1e-3
    for name, expected in plain.items():
        torch.testing.assert_close(checkpointed[name], expected, rtol=1e-6, atol=1e-9, msg=name)


def test_reentrant_checkpointing_is_refused(siglip):
    model = make_model(siglip).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        gradients(model, make_batch(LAYOUTS), [1])
    model.eval()  # nothing is checkpointed there
    assert forward(model, make_batch(LAYOUTS), [1])[0]


def test_training_arguments_force_the_non_reentrant_kind(tmp_path):
    args = arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert args.gradient_checkpointing_kwargs["use_reentrant"] is False


# ---------------------------------------------------------------------------------------------------------------------
# Group means
# ---------------------------------------------------------------------------------------------------------------------
def test_group_means_are_plain_means():
    groups = [[1, 2, 3], [2, 3, 4], [7]]
    maps = {layer: torch.rand(2, 5, 3, dtype=torch.float64) for layer in range(9)}
    given = {layer: attention.clone() for layer, attention in maps.items()}
    means = GroupMeans(groups)
    assert means.layers == [1, 2, 3, 4, 7]
    for _ in range(2):  # a second forward after begin()
        means.begin()
        for layer in means.layers:
            means.receive(layer, maps[layer])
    for group, mean in zip(groups, means.means, strict=True):
        torch.testing.assert_close(mean, torch.stack([given[layer] for layer in group]).mean(dim=0))
    for layer, attention in maps.items():
        torch.testing.assert_close(attention, given[layer], rtol=0, atol=0)  # groups do not share memory


def test_group_means_say_which_groups_are_missing():
    means = GroupMeans([[0], [1]])
    means.receive(0, torch.zeros(1, 2, 1))
    with pytest.raises(RuntimeError, match=r"has not filled the groups \[1\]"):
        means.means  # noqa: B018


# ---------------------------------------------------------------------------------------------------------------------
# The objective of DFT, end to end
# ---------------------------------------------------------------------------------------------------------------------
def arguments(folder, **changes) -> TrainingArguments:
    values = {"output_dir": str(folder), "stage": "dft", "use_cpu": True, "report_to": "none"}
    return TrainingArguments(**{**values, "student_layers": "0,2,3", "teacher_layers": "1,2,3,4,5", **changes})


def make_objective(student, teacher, args, vocab_size) -> Objective:
    terms = find_method(args.method).terms(args.stage, args)
    return Objective(student, teacher, terms, vocab_size, args.attention_map_impl)


PAIRS = {
    "taf": {},
    "no taf": {"taf": False},
    "llama": {"family": "llama"},
    "eager": {"attention": "eager"},
    "truncated": {"tokenizer_model_max_length": 27},
    "tied": {"tie_word_embeddings": True},
    "checkpointed": {"checkpointed": True},
    "warm": {"kd_temperature": 2.5},
    "chunked": {"attention_map_impl": "chunked"},
}


MODEL_OPTIONS = ("attention", "tokenizer_model_max_length", "tie_word_embeddings")


@pytest.mark.parametrize("pair", PAIRS)
def test_losses_and_gradients_of_dft_equal_the_reference(siglip, tmp_path, pair):
    options = dict(PAIRS[pair])
    taf, family = options.pop("taf", True), options.pop("family", "qwen2")
    temperature = options.get("kd_temperature", 1.0)
    checkpointed = options.pop("checkpointed", False)
    model_options = {k: options.pop(k) for k in MODEL_OPTIONS if k in options}
    dtype = model_options["dtype"] = precision(model_options.get("attention", "sdpa"))
    teacher = make_model(
        siglip, family, hidden=48, layers=6, heads=6, kv_heads=3, vocab=128, seed=1, **model_options
    ).requires_grad_(False)
    student = make_model(siglip, family, seed=2, teacher=teacher if taf else None, **model_options)
    if taf:
        student.get_model().mm_projector.teacher_adapter.requires_grad_(False)
    if checkpointed:
        student.train()
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = make_batch(LAYOUTS, dtype=dtype)
    common = 91  # the real vocabulary; the models' are padded to 96 and 128

    objective = make_objective(student, teacher, arguments(tmp_path, **options), common)
    groups = [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert objective.term("attention").groups == groups and objective.pair.shares_encoder
    samples = merged_samples(batch, model_options.get("tokenizer_model_max_length"))
    features = encoder_features(teacher, batch.inputs["images"]).double()
    weights = weights_of(student)
    lm, kl, attention, rows, images = reference.loss_sums(
        (weights, student.config), (weights_of(teacher), teacher.config), samples, features, [0, 2, 3], groups, common,
        temperature,
    )  # fmt: skip
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    expected = torch.autograd.grad(lm / rows + kl / rows + attention / images, list(trained.values()))

    with objective.running():
        sums = objective(student, {**batch.inputs, "use_cache": False})
        answers, maps = sums["answers"], sums["attention"]
        close(answers.logged["lm"], lm, 1e-5)
        close(answers.logged["kl"], kl, 1e-5)
        close(maps.loss, attention, 1e-5)
        close(maps.measured["attention_similarity"][0], images - attention, 1e-5)
        assert attention / images > 0.02 and kl / rows > 1e-3, "the pair is too alike to test anything"
        (answers.loss / rows + maps.loss / images).backward()
    assert not objective.is_running
    for (name, parameter), gradient in zip(trained.items(), expected, strict=True):
        scale = max(gradient.abs().max().item(), 1e-6)
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-4, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert all(p.grad is None for p in teacher.parameters())


def small_pair(siglip, student_tower=None, **config):
    teacher = make_model(siglip, hidden=48, layers=6, heads=6, vocab=128, seed=1, dtype=torch.float32, **config)
    student = make_model(student_tower or siglip, seed=2, dtype=torch.float32, **config)
    return student, teacher.requires_grad_(False)


def test_sequences_that_are_cut_at_different_answers_share_the_others(siglip, tmp_path):
    """Encoders with other numbers of patches: the limit that leaves the same text beside an image leaves more or less
    of a text alone. L_KL takes the answers that both models have, L_LM all of the student's."""
    tower = save_tower(tmp_path / "siglip-4", patches=4)
    student, teacher = small_pair(siglip, tower, tokenizer_model_max_length=20)
    objective = make_objective(student, teacher, arguments(tmp_path, vat=False), 91)
    assert not objective.pair.shares_encoder and teacher.config.tokenizer_model_max_length == 20 + 16 - 4
    batch = make_batch(["qIaaaaaaaaaaaaaaaaaaa", "qq" + "a" * 28], dtype=torch.float32)
    with objective.running():
        sums = objective(student, batch.inputs)["answers"]
        found = {name: float(value) for name, value in sums.logged.items()}
    expected = {"lm": 0.0, "kl": 0.0}
    for ids, labels, first in batch.samples:
        inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        inputs["images"] = batch.inputs["images"][first : first + 1]
        logits, targets = [], []
        for model in (student, teacher):
            with torch.no_grad(), record_merge(model) as recorder:
                out = model(**inputs, use_cache=False).logits[0].double()
            logits.append(out[recorder.batch.answer_mask()[0]])
            targets.append(recorder.batch.answer_targets())
        count = min(map(len, logits))
        expected["lm"] += float(torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum"))
        p, q = (part[:count, :91].log_softmax(-1) for part in (logits[1], logits[0]))
        expected["kl"] += float((p.exp() * (p - q)).sum())
        assert (len(logits[0]), len(logits[1])) == ((15, 15) if -200 in ids else (18, 28))
    assert found == pytest.approx(expected, rel=1e-4)


def test_wrong_use_of_the_objective_is_an_error(siglip, tmp_path):
    student, teacher = small_pair(siglip)
    objective = make_objective(student, teacher, arguments(tmp_path), 91)
    batch = make_batch(LAYOUTS, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="inside `with objective.running"):
        objective(student, batch.inputs)
    student.requires_grad_(False)
    with objective.running(), pytest.raises(RuntimeError, match="layer 0 carries no gradient.*frozen"):
        objective(student, batch.inputs)
    student.requires_grad_(True)
    with objective.running():
        objective(student, batch.inputs)["attention"].loss.backward()
    assert student.model.layers[0].self_attn.q_proj.weight.grad.any()
    for model in (student, teacher):  # nothing is left behind, by the errors neither
        assert not {"prepare_inputs_labels_for_multimodal", "encode_images"} & set(vars(model))
        assert "forward" not in vars(model.lm_head)


def test_measuring_trains_nothing(siglip, tmp_path):
    student, teacher = small_pair(siglip)
    batch = make_batch(LAYOUTS, dtype=torch.float32)
    trained = make_objective(student, teacher, arguments(tmp_path), 91)
    measured = make_objective(student, teacher, arguments(tmp_path, vat=False, measure_attention=True), 91)
    found = []
    for objective in (trained, measured):
        with objective.running():
            found.append(objective(student, batch.inputs)["attention"])
    (similarity, samples), (other, _) = (sums.measured["attention_similarity"] for sums in found)
    assert found[1].loss is None and not other.requires_grad
    close(other, similarity.double(), 1e-6)
    close(samples - found[0].loss, similarity.double(), 1e-6)
    assert int(samples) == 3


def test_the_attention_terms_own_gradient_is_right(siglip, tmp_path):
    """Alone, where no other term can hide it; L_ADL reaches nothing above the tapped layer's query and key."""
    teacher = make_model(siglip, hidden=48, layers=6, heads=6, kv_heads=6, vocab=128, seed=1)
    teacher.requires_grad_(False)
    student = make_model(siglip, seed=2, teacher=teacher)
    batch = make_batch(LAYOUTS)
    objective = make_objective(student, teacher, arguments(tmp_path, student_layers="1", teacher_layers="2,3"), 91)
    weights = weights_of(student)
    _, _, attention, _, _ = reference.loss_sums(
        (weights, student.config), (weights_of(teacher), teacher.config), merged_samples(batch),
        encoder_features(teacher, batch.inputs["images"]), [1], [[2, 3]], 91,
    )  # fmt: skip
    names = [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.embed_tokens.weight",
    ]
    parameters = dict(student.named_parameters())
    expected = torch.autograd.grad(attention, [parameters[name] for name in names])
    with objective.running():
        objective(student, {**batch.inputs, "use_cache": False})["attention"].loss.backward()
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
    for name in ("model.layers.2.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"):
        assert parameters[name].grad is None or not parameters[name].grad.any()


def test_under_autocast_a_gpu_s_map_is_of_what_attention_multiplies(monkeypatch):
    """Rotary embeddings leave queries and keys in float32, for which the kernels have no tensor cores."""
    states = torch.randn(1, 2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert as_multiplied(states) is states, "not on a CPU"
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert as_multiplied(states) is states
    with torch.autocast("cpu", torch.bfloat16):
        assert as_multiplied(states).dtype == torch.bfloat16
