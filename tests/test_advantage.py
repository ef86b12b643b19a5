"""Visual advantage: weights of tokens and rows, the teacher's pass on the text alone, and the runs that use them."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import reference
import torch
from checks import PLAIN, assert_same_log, assert_same_weights, killed_and_resumed, trained_weights
from factory import encoder_features, make_batch, make_model, save_tower
from test_capture import merged_samples, weights_of
from test_rivals import gradients
from tiny import read_log, sample

from llava_compodistill.losses.advantage import advantage_weights
from llava_compodistill.methods.advantage import AdvantageTerm
from llava_compodistill.record.encoding import encode_for
from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.objective import Objective

#: Two images, a caption without a prompt (whose first token no text precedes), text alone, an answer before the image.
LAYOUTS = ["qIqqIqaaqa", "Iaaqa", "qqqaa", "qaaIqaqaa"]
VOCAB = 91  # the real one; the heads have 96 and 128 rows
GROUPS = [[1, 2, 3], [2, 3, 4], [3, 4, 5]]


# ---------------------------------------------------------------------------------------------------------------------
# The weights
# ---------------------------------------------------------------------------------------------------------------------
def test_weights_of_a_sample():
    nothing = math.nan
    # p(y | text) / p(y | image, text) = 1/4, 1, 2 (the image misleads) and 0, and a token that has no advantage
    advantage = torch.tensor([[math.log(4), 0.0, -math.log(2), 800.0, nothing], [0.0, 0.0, -3.0, nothing, nothing]])
    weights = advantage_weights(advantage.double(), 0.25)
    mean = (0.75 + 0 + 0 + 1) / 4 + 0.25
    expected = [1.0 / mean, 0.25 / mean, 0.25 / mean, 1.25 / mean, 1.0]
    assert weights[0].tolist() == pytest.approx(expected, rel=1e-9)
    assert weights[0, :4].mean().item() == pytest.approx(1)
    assert weights[1].tolist() == [1.0] * 5, "no token has any advantage, or there is none"


def test_weights_are_bounded_and_rise_with_the_advantage():
    torch.manual_seed(0)
    advantage = (4 * torch.randn(50, 40, dtype=torch.float64)).sort(dim=1).values
    one = torch.full((1, 40), -1.0, dtype=torch.float64)
    one[0, 7] = 50.0  # a single token takes what it can get
    for floor in (0.05, 1.0):
        for values in (advantage, one):
            weights = advantage_weights(values, floor)
            assert weights.mean(dim=1).tolist() == pytest.approx([1.0] * len(values))
            assert weights.max() < 1 + 1 / floor
        assert (advantage_weights(advantage, floor).diff(dim=1) >= 0).all()
    almost = advantage_weights(torch.tensor([[1e-4, 0.0, 0.0]]), 0.1)
    assert (almost - 1).abs().max() < 1e-3, "a little noise stays a little"
    with pytest.raises(ValueError, match="floor must be greater than 0, got 0"):
        advantage_weights(advantage, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# The objective, against a computation of its own (reference.py)
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def tower(siglip, monkeypatch):
    # transformers 4.37 fills the mask of padded batches with float64's smallest number in torch's default dtype.
    monkeypatch.setattr(torch, "full", partial(torch.full, dtype=torch.float64))
    return siglip


def make_pair(tower, teacher_tower=None, **options):
    sizes = {"hidden": 48, "layers": 6, "heads": 6, "kv_heads": 3, "vocab": 128}
    teacher = make_model(teacher_tower or tower, seed=1, **sizes, **options).requires_grad_(False)
    teacher.lm_head.weight.mul_(15)  # so that the image matters to a random model
    return make_model(tower, seed=2, **options), teacher


def make_objective(pair, folder, **changes):
    values = {"stage": "dft", "use_cpu": True, "report_to": "none", "student_layers": "0,2,3"}
    args = TrainingArguments(str(folder), **{**values, "teacher_layers": "1,2,3,4,5", **changes})
    return Objective(*pair, args.chosen_method.terms(args.stage, args), VOCAB)


def run(objective, batch):
    """The sums of the terms, and the gradients of the student."""
    student = objective.pair.student
    student.zero_grad()
    with objective.running():
        sums = objective(student, {**batch.inputs, "use_cache": False})
        sum(found.loss for found in sums.values() if found.loss is not None).backward()
    for found in sums.values():
        found.loss = None if found.loss is None else found.loss.detach()
    return sums, gradients(student)


def teacher_passes(objective, batch):
    """The teacher's pass, which holds the blind one."""
    with encode_for(objective.pair):
        found = objective.run_teacher(batch.inputs, objective._needs()[1])
        objective._run_blind(batch.inputs, found)
    return found


def advantages_of(teacher, merged, features):
    """By position of the predicting row: the advantage of each answer token, None where no text precedes it."""
    weights, config = teacher
    hidden, _ = reference.run(weights, config, merged, features)
    text = [place for place, kind in enumerate(merged.kinds) if kind[0] == "text"]
    alone = reference.Merged([merged.kinds[place] for place in text], [merged.labels[place] for place in text])
    blind, _ = reference.run(weights, config, alone, features)
    found = {}
    for row in merged.answers:
        place, label = text.index(row + 1), merged.labels[row + 1]
        sighted, unsighted = (
            torch.log_softmax(weights["lm_head.weight"] @ states, 0)[label]
            for states in (hidden[row], blind[place - 1])
        )
        found[row] = sighted - unsighted if place else None
    return found


def weights_by_row(advantages, floor):
    values = {
        row: floor + max(0.0, 1 - math.exp(-float(advantage)))
        for row, advantage in advantages.items()
        if advantage is not None
    }
    mean = sum(values.values()) / max(1, len(values))
    return {row: values[row] / mean if row in values else 1.0 for row in advantages}


def expected_sums(pair, samples, features, args):
    """(L_LM, L_KL, L_ADL) as sums, and the advantages of all samples with an image."""
    student, teacher = ((weights_of(model), model.config) for model in pair)
    temperature = args.kd_temperature
    lm = kl = attention = torch.zeros((), dtype=torch.float64)
    known = []
    for merged in samples:
        hidden_s, maps_s = reference.run(*student, merged, features)
        hidden_t, maps_t = reference.run(*teacher, merged, features)
        weights = dict.fromkeys(merged.answers, 1.0)
        if merged.visual:
            advantages = advantages_of(teacher, merged, features)
            known += [float(advantage) for advantage in advantages.values() if advantage is not None]
            weights = weights_by_row(advantages, args.advantage_floor)
        for row in merged.answers:
            logits = student[0]["lm_head.weight"] @ hidden_s[row]
            lm = lm + torch.logsumexp(logits, 0) - logits[merged.labels[row + 1]]
            mine = torch.log_softmax(logits[:VOCAB] / temperature, 0)
            theirs = torch.log_softmax((teacher[0]["lm_head.weight"] @ hidden_t[row])[:VOCAB] / temperature, 0)
            weight = weights[row] if args.visual_advantage in ("tokens", "both") else 1.0
            kl = kl + weight * temperature**2 * (theirs.exp() * (theirs - mine)).sum()
        if not merged.visual or args.stage != "dft":
            continue
        for layer, group in zip([0, 2, 3], GROUPS, strict=True):
            target = torch.stack([reference.visual_map(maps_t[t], merged.visual) for t in group]).mean(dim=0)
            mine = reference.visual_map(maps_s[layer], merged.visual)
            total = mass = 0.0
            for row in range(merged.visual[0], len(merged.kinds)):
                if args.attention_rows == "answer" and row not in merged.answers:
                    continue
                weight = weights.get(row, 1.0) if args.visual_advantage in ("rows", "both") else 1.0
                total, mass = total + weight * reference.attention_distance(mine, target, [row]), mass + weight
            attention = attention + total / mass / 3
    return lm, kl, attention, known


@pytest.mark.parametrize(
    "options",
    [
        {"visual_advantage": "tokens", "kd_temperature": 2.0},
        {"visual_advantage": "rows", "advantage_floor": 0.02},
        {"visual_advantage": "both", "attention_rows": "answer", "advantage_floor": 0.02},
        {"visual_advantage": "tokens", "stage": "dpt"},
        {"visual_advantage": "tokens", "method": "kd", "family": "llama"},
        {"visual_advantage": "both", "checkpointed": True},
        {"visual_advantage": "both", "tokenizer_model_max_length": 24},
    ],
    ids=str,
)
def test_losses_and_gradients_equal_the_reference(tower, tmp_path, options):
    options = dict(options)
    checkpointed, family = options.pop("checkpointed", False), options.pop("family", "qwen2")
    limit = options.pop("tokenizer_model_max_length", None)
    pair = student, teacher = make_pair(tower, family=family, tokenizer_model_max_length=limit)
    if checkpointed:
        student.train()
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = make_objective(pair, tmp_path, **options)
    args = objective.term("advantage").args
    batch = make_batch(LAYOUTS)
    features = encoder_features(teacher, batch.inputs["images"])
    samples = merged_samples(batch, limit)
    lm, kl, attention, known = expected_sums(pair, samples, features, args)
    aligned = "attention" in {term.name for term in objective.terms}
    assert aligned == (args.stage == "dft" and args.method != "kd")
    trained = dict(student.named_parameters())
    trained = {name: parameter for name, parameter in trained.items() if parameter.requires_grad}
    gradient = torch.autograd.grad(lm + kl + (attention if aligned else 0.0), [*trained.values()], allow_unused=True)
    lm, kl, attention = lm.detach(), kl.detach(), torch.as_tensor(attention).detach()
    sums, found = run(objective, batch)

    # transformers computes norms and rotary angles in float32.
    assert float(sums["answers"].logged["lm"]) == pytest.approx(float(lm), rel=1e-5)
    assert float(sums["answers"].logged["kl"]) == pytest.approx(float(kl), rel=1e-5)
    assert float(sums["answers"].loss) == pytest.approx(float(lm + kl), rel=1e-5)
    if aligned:
        assert float(sums["attention"].loss) == pytest.approx(float(attention), rel=1e-5)
        similarity, counted = sums["attention"].measured["attention_similarity"]
        plain = reference.loss_sums(
            *((weights_of(model), model.config) for model in pair), samples, features, [0, 2, 3], GROUPS, VOCAB
        )
        if args.attention_rows == "all":
            assert float(counted - similarity) == pytest.approx(plain[2].item(), rel=1e-5), "measured without weights"
            assert args.visual_advantage == "tokens" or (attention - plain[2]).abs() > 1e-5
    total, count = sums["advantage"].measured["advantage"]
    assert int(count) == len(known) == (7 if limit else 10)
    assert float(total) == pytest.approx(sum(known), rel=1e-4)
    assert max(known) > 0.3 and min(known) < 0, "too alike to test the weights"
    for (name, parameter), expected in zip(trained.items(), gradient, strict=True):
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any()
            continue
        scale = max(expected.abs().max().item(), 1e-6)
        torch.testing.assert_close(
            found[name], expected, rtol=1e-4, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_an_encoder_of_the_teachers_own_finds_the_same_rows(tower, tmp_path):
    """With fewer patches: answers stand elsewhere, and the limit cuts another number of them."""
    coarse = save_tower(tmp_path / "siglip-4", patches=4)
    pair = student, teacher = make_pair(tower, coarse, dtype=torch.float32, tokenizer_model_max_length=30)
    objective = make_objective(pair, tmp_path, visual_advantage="both", student_layers="1", teacher_layers="2,3")
    assert not objective.pair.shares_encoder and teacher.config.tokenizer_model_max_length == 30 - 16 + 4
    batch = make_batch(["qIqaqa", "Iqaaqa", "qqaa", "q" * 12 + "a" * 12], dtype=torch.float32)
    features = encoder_features(teacher, batch.inputs["images"]).double()
    theirs = [reference.merge(ids, labels, image, 4, 18) for ids, labels, image in batch.samples]
    mine = [reference.merge(ids, labels, image, 16, 30) for ids, labels, image in batch.samples]
    found = teacher_passes(objective, batch)
    with objective.running():
        objective(student, {**batch.inputs, "use_cache": False})
        student_pass = objective._recorder.latest
        rows = objective.term("advantage").row_weights(student_pass, found)
    assert [len(sample.answers) for sample in theirs] == [2, 3, 2, 6] and len(mine[3].answers) == 12
    for number, (own, other) in enumerate(zip(mine, theirs, strict=True)):
        expected = torch.ones(len(rows[number]), dtype=torch.float64)
        if other.visual:
            advantages = advantages_of((weights_of(teacher), teacher.config), other, features)
            weights = weights_by_row(advantages, 0.1)
            for row, weight in zip(own.answers, weights.values(), strict=True):
                expected[row] = weight
            assert expected.std() > 0.02
        torch.testing.assert_close(rows[number].double(), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The teacher without its images
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_blind_pass_is_the_teachers_own_on_the_text(tower, tmp_path, attention):
    pair = _, teacher = make_pair(tower, attention=attention, dtype=torch.float32)
    objective = make_objective(pair, tmp_path, visual_advantage="tokens")
    batch, other = make_batch(LAYOUTS, dtype=torch.float32), make_batch(LAYOUTS, dtype=torch.float32)
    other.inputs["images"] = other.inputs["images"].flip(-1)
    found, elsewhere = teacher_passes(objective, batch), teacher_passes(objective, other)
    assert torch.equal(found.blind.log_probs, elsewhere.blind.log_probs), "it does not depend on the pixels"
    assert (found.log_probs - elsewhere.log_probs).abs().max() > 1e-2, "and the other one does"
    expected = []
    for ids, labels, _ in batch.samples:
        if -200 not in ids:
            continue
        kept = [place for place, token in enumerate(ids) if token != -200]
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([[ids[place] for place in kept]]), use_cache=False).logits[0]
        for row, place in enumerate(kept[1:]):
            if labels[place] != -100:
                expected.append(logits[row].log_softmax(-1)[labels[place]])
    torch.testing.assert_close(found.blind.log_probs, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_what_the_blind_pass_costs(tower, tmp_path):
    """One forward of the teacher over the text of the samples with an image; nothing where no term asks."""
    pair = student, teacher = make_pair(tower, dtype=torch.float32)
    shapes, encoded = [], []
    teacher.get_model().layers[0].mlp.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:2]))
    student.get_vision_tower().vision_tower.register_forward_pre_hook(lambda *args: encoded.append(1))
    plain, weighed = (make_objective(pair, tmp_path, visual_advantage=value) for value in ("none", "both"))
    batch, text = make_batch(LAYOUTS, dtype=torch.float32), make_batch(["qqaa", "qa"], dtype=torch.float32)
    run(plain, batch)
    assert shapes == [(4, 40)] and len(encoded) == 1
    shapes.clear()
    run(weighed, batch)
    assert shapes == [(4, 40), (3, 8)] and len(encoded) == 2, "the encoder does not run again"
    shapes.clear()
    sums, found = run(weighed, text)
    assert shapes == [(2, 4)]
    expected, gradient = run(plain, text)
    assert torch.equal(sums["answers"].loss, expected["answers"].loss)
    assert all(torch.equal(value, gradient[name]) for name, value in found.items())
    total, count = sums["advantage"].measured["advantage"]
    assert float(total) == float(count) == 0


def test_tokens_that_do_not_depend_on_the_image_weigh_little(tower, tmp_path):
    pair = make_pair(tower)
    objective = make_objective(pair, tmp_path, visual_advantage="tokens")
    batch = make_batch(["qaaqaIqaaaaa", "qqaaa", "Iqa"])
    weights = objective.term("advantage").token_weights(teacher_passes(objective, batch))
    before, after, text, alone = weights.split([3, 5, 3, 1])
    assert before.max() - before.min() < 1e-6 and before.max() < 0.5 * after.max(), "answers before the image"
    assert before.max() <= after.min() + 1e-6
    assert weights[:8].mean().item() == pytest.approx(1)
    assert text.tolist() == [1.0] * 3 and alone.tolist() == [1.0]


def test_shuffled_weights_depend_on_the_seed_and_the_sample_alone(tower, tmp_path):
    pair = make_pair(tower)
    layouts = ["Iqaaaaaaaa", "qIqaaaaa", "qqaa"]
    batch = make_batch(layouts)

    def weights(batch, **options):
        objective = make_objective(pair, tmp_path, visual_advantage="tokens", **options)
        return objective.term("advantage").token_weights(teacher_passes(objective, batch))

    plain, shuffled = weights(batch), weights(batch, shuffle_advantage=True)
    for mine, own in zip(shuffled.split([8, 5, 2]), plain.split([8, 5, 2]), strict=True):
        assert torch.equal(mine.sort().values, own.sort().values), "the same weights"
    assert (shuffled - plain).abs().max() > 0.1, "at other tokens"
    torch.manual_seed(5)
    assert torch.equal(weights(batch, shuffle_advantage=True), shuffled)
    assert not torch.equal(weights(batch, shuffle_advantage=True, seed=7), shuffled)
    alone = make_batch(layouts)
    for name, value in alone.inputs.items():
        alone.inputs[name] = value[1:2]
    torch.testing.assert_close(weights(alone, shuffle_advantage=True), shuffled[8:13])


def test_an_identical_teacher_leaves_nothing_to_distil(tower, tmp_path):
    student, teacher = (make_model(tower, seed=2) for _ in range(2))
    layers = {"student_layers": "1,2", "teacher_layers": "1,2"}
    objective = make_objective((student, teacher.requires_grad_(False)), tmp_path, visual_advantage="both", **layers)
    batch = make_batch(LAYOUTS)
    sums, _ = run(objective, batch)
    total, count = sums["advantage"].measured["advantage"]
    assert abs(float(sums["answers"].logged["kl"])) < 1e-9 and abs(float(sums["attention"].loss)) < 1e-9
    assert float(count) > 0 and abs(float(total)) > 0.01, "the advantage is the teacher's, not the difference of both"


def test_weights_of_one_give_the_unweighted_losses(tower, tmp_path):
    """A floor that is larger than any advantage by far."""
    pair = make_pair(tower)
    batch = make_batch(LAYOUTS)
    sums, found = run(make_objective(pair, tmp_path, visual_advantage="both", advantage_floor=1e14), batch)
    expected, gradient = run(make_objective(pair, tmp_path), batch)
    for name in ("answers", "attention"):
        torch.testing.assert_close(sums[name].loss, expected[name].loss, rtol=1e-9, atol=0)
    for name, value in gradient.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"method": "llava_kd"},
            "tokens: --method llava_kd takes none; kd takes tokens, compodistill tokens, ",
        ),
        ({"method": "release"}, "--method release takes none"),
        ({"method": "switch_kd"}, "--method switch_kd takes none"),
        ({"method": "toy_method:Toy"}, "--method toy_method:Toy takes none"),
        ({"method": "sft", "stage": "sft"}, "--method sft takes none"),
        ({"method": "kd", "visual_advantage": "rows"}, "rows: --method kd takes tokens;"),
        ({"method": "kd", "visual_advantage": "both"}, "both: --method kd takes tokens;"),
        ({"stage": "sft"}, "tokens: --stage sft of compodistill has no teacher: leave the flag out"),
        ({"kl_weight": 0.0}, "--kl_weight 0 leaves out"),
        ({"visual_advantage": "rows", "stage": "dpt"}, "rows: it weighs the rows of L_ADL.* use tokens"),
        ({"visual_advantage": "both", "vat": False}, "both: it weighs the rows of L_ADL.* use tokens"),
        ({"visual_advantage": "rows", "attention_weight": 0.0}, "rows: it weighs the rows of L_ADL.* use tokens"),
        ({"visual_advantage": "rows", "attention_similarity": "matrix"}, "matrix compares whole maps"),
        ({"visual_advantage": "rows", "attention_rows": "visual"}, "visual leaves out the queries that predict"),
        ({"visual_advantage": "none", "shuffle_advantage": True}, "--shuffle_advantage True: nothing is weighed"),
        ({"advantage_floor": 0.0}, "--advantage_floor 0.0: must be greater than 0"),
        ({"advantage_floor": math.inf}, "--advantage_floor inf: .* finite"),
    ],
)
def test_what_cannot_be_weighed_is_refused(tmp_path, options, message):
    values = {"stage": "dft", "use_cpu": True, "report_to": "none", "visual_advantage": "tokens"}
    with pytest.raises(ValueError, match=message):
        TrainingArguments(str(tmp_path), **{**values, **options})


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
def test_accumulation_and_checkpointing_change_nothing(dft):
    """Micro-batches with and without an image: 4 of the 16 samples are text alone."""
    options = {**PLAIN, "visual_advantage": "both", "max_steps": 2}
    whole, expected = dft("whole", per_device_train_batch_size=8, **options)
    saving = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True}
    parts, found = dft("parts", **saving, **options)
    assert_same_log(found[:1], expected[:1], 2e-5)
    assert_same_log(found, expected)
    assert [entry["advantage"] for entry in found] == pytest.approx(
        [entry["advantage"] for entry in expected], abs=1e-4
    )
    assert_same_weights(trained_weights(parts.model), trained_weights(whole.model), 2e-5)
    _, plain = dft("plain", per_device_train_batch_size=8, **{**options, "visual_advantage": "none", "max_steps": 1})
    assert "advantage" not in plain[0] and plain[0]["lm"] == expected[0]["lm"]
    assert abs(plain[0]["kl"] - expected[0]["kl"]) > 1e-5 and plain[0]["attention"] != expected[0]["attention"]
    assert expected[0]["loss"] == pytest.approx(sum(expected[0][name] for name in ("lm", "kl", "attention")), rel=1e-4)


@pytest.mark.once
@pytest.mark.long
def test_two_processes_weigh_alike(ranks, dft, world, sharp_teacher, mixed, tmp_path):
    """Where a rank holds text alone, its teacher runs once, and the other's twice."""
    from test_distributed import parallel_flags

    options = {"visual_advantage": "both", "shuffle_advantage": True, "max_steps": 3, "per_device_train_batch_size": 1}
    _, expected = dft("one", gradient_accumulation_steps=2, **PLAIN, **options)
    flags = parallel_flags(world, sharp_teacher, mixed, tmp_path / "two", ddp_backend="gloo", **options)
    ranks.train_well(flags, 2, tmp_path / "log")
    found = read_log(tmp_path / "two")
    assert_same_log(found, expected, 2e-5)
    advantages = [[entry["advantage"] for entry in log] for log in (found, expected)]
    assert advantages[0] == pytest.approx(advantages[1], abs=1e-4)


@pytest.mark.parametrize("method, attention", [("kd", None), ("compodistill", "matched")])
def test_dpt_and_other_methods(dft, world, method, attention):
    if method == "kd":
        captions = {"stage": "dpt", "mm_projector_type": "taf", "data_path": world["data"] / "pretrain.json"}
        _, log = dft(method=method, visual_advantage="tokens", max_steps=2, **captions)
        assert all(math.isfinite(entry["advantage"]) and "attention" not in entry for entry in log)
    else:
        _, log = dft(attention_heads=attention, visual_advantage="both", attention_loss="kl", max_steps=2, bf16=True)
        assert all(math.isfinite(entry["advantage"]) and entry["attention"] > 0 for entry in log)


def test_text_alone_logs_no_advantage(dft, tmp_path):
    path = tmp_path / "text.json"
    path.write_text(json.dumps([sample(number, None, 2) for number in range(4)]))
    _, log = dft(data_path=path, visual_advantage="both", max_steps=1)
    assert "advantage" not in log[0] and log[0]["attention"] == 0 and log[0]["kl"] > 0


def test_a_killed_run_goes_on_as_if_nothing_had_happened(dft, monkeypatch):
    options = {"visual_advantage": "both", "shuffle_advantage": True, "max_steps": 4}
    unbroken, expected = dft("unbroken", **options)
    resumed, found = killed_and_resumed(dft, monkeypatch, **options)
    assert_same_log(found, expected, 1e-5)
    assert [entry["advantage"] for entry in found] == pytest.approx([entry["advantage"] for entry in expected])
    assert_same_weights(trained_weights(resumed.model), trained_weights(unbroken.model), 1e-5)
    with pytest.raises(Exception, match="advantage_floor: 0.1 there, 0.5 in this command"):
        dft("broken", advantage_floor=0.5, save_strategy="steps", save_steps=2, **options)


def test_the_term_is_one_of_its_own(tmp_path):
    """Its weights reach the other terms by reference, so that one pass and one log entry serve both."""
    args = TrainingArguments(str(tmp_path), stage="dft", use_cpu=True, report_to="none", visual_advantage="both")
    answers, advantage, attention = args.chosen_method.terms("dft", args)
    assert isinstance(advantage, AdvantageTerm)
    assert answers.advantage is advantage and attention.advantage is advantage
