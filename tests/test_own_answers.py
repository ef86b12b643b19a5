"""On-policy distillation: what the student answers itself, what becomes of a batch, and which losses it has."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from checks import PLAIN, assert_same_log, assert_same_weights, killed_and_resumed, trained_weights
from factory import make_batch, make_model
from test_capture import arguments, make_objective
from transformers import AutoTokenizer

from llava_compodistill.hosts.llava import register
from llava_compodistill.hosts.llava.templates import prepare_tokenizer, under_template
from llava_compodistill.record.merge import record_merge
from llava_compodistill.train import facts
from llava_compodistill.train.facts import BatchFacts, CountingCollator
from llava_compodistill.train.own_answers import OwnAnswers, choose_tokens, draw

pytestmark = pytest.mark.invariant

IGNORE, IMAGE = -100, -200


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.once
def test_what_is_drawn_depends_on_seed_step_and_place_alone():
    before = torch.get_rng_state()
    chance, numbers = draw(3, 5, 7, 4)
    again = draw(3, 5, 7, 9)
    assert chance == again[0] and torch.equal(numbers, again[1][:4]), "not on how many are asked for"
    others = {draw(*changed, 4)[0] for changed in ((4, 5, 7), (3, 6, 7), (3, 5, 8), (3, 57, 0), (35, 7, 0))}
    assert len(others | {chance}) == 6
    assert torch.equal(torch.get_rng_state(), before)
    chances = torch.tensor([draw(0, step, place, 1)[0] for step in range(20) for place in range(50)])
    assert abs(float((chances < 0.3).float().mean()) - 0.3) < 0.05


@pytest.mark.once
def test_tokens_are_drawn_by_their_probabilities():
    logits = torch.tensor([2.0, -torch.inf, 0.0, 1.0, -torch.inf])
    for temperature in (1.0, 0.5, 3.0):
        weights = [float(torch.tensor(value / temperature).exp()) for value in logits.tolist()]
        numbers = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
        found = choose_tokens(logits.expand(2000, -1), numbers, temperature)
        shares = [float((found == token).double().mean()) for token in range(5)]
        assert shares == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-3)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose_tokens(logits.expand(2, -1), edges, 1.0).tolist() == [0, 3], "none that cannot be"
    assert choose_tokens(logits.expand(2, -1), edges, 0.0).tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of a batch
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def talker(world, mixed, tmp_path_factory):
    """A student that has learned to answer and to end its answers, not always well."""
    path = tmp_path_factory.mktemp("talker") / "llava-talker"
    options = {"mm_projector_type": "mlp2x_gelu", "data_path": mixed, "learning_rate": 1e-2, "blind": "off"}
    tiny.run(world, "sft", path, max_steps=30, per_device_train_batch_size=8, logging_steps=30, **options)
    return path


@pytest.fixture
def on_policy(dft, talker):
    """A DFT run in which the student answers itself; (trainer, log)."""

    def run(name="own", **changes):
        values = {
            "model_name_or_path": talker,
            "on_policy": 1.0,
            "on_policy_max_tokens": 6,
            "on_policy_temperature": 1.2,
        }
        return dft(name, **{**values, **changes})

    return run


def window_of(trainer, sizes=(4, 4)):
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    dataset = trainer.train_dataset
    return [
        trainer.data_collator([dataset[index] for index in range(start, start + size)])
        for start, size in zip(starts, sizes, strict=True)
    ]


def unpadded(batch):
    return [
        (ids[mask].tolist(), labels[mask].tolist())
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]


def parts(ids, labels):
    """(prompt, answer, tail) of the last answer: what is before it, its labelled tokens, and what follows."""
    stop = max(place for place, label in enumerate(labels) if label != IGNORE) + 1
    start = max(place for place in range(stop) if labels[place] == IGNORE) + 1
    return (ids[:start], labels[:start]), ids[start:stop], ids[stop:]


def check_tokens(model, batch, row, answer, numbers, temperature, tokenizer):
    """One forward over the sample alone, without a cache: its answer is what these numbers draw from these logits."""
    ids, labels = unpadded(batch)[row]
    inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    if "images" in batch:
        counts = [max(1, tokens.count(IMAGE)) for tokens, _ in unpadded(batch)]
        inputs["images"] = batch["images"][sum(counts[:row]) : sum(counts[: row + 1])]
    with torch.no_grad(), record_merge(model) as recorder:
        logits = model(**inputs, use_cache=False).logits[0].double()
    rows = logits[recorder.batch.answer_mask()[0]][-len(answer) :, : len(tokenizer)]
    for token, number, values in zip(answer, numbers.tolist(), rows, strict=False):
        values[tokenizer.pad_token_id] = -torch.inf
        if temperature == 0:
            assert values[token] >= values.max() - 1e-5
            continue
        sums = torch.softmax(values / temperature, dim=0).cumsum(dim=0)
        below = float(sums[token - 1]) if token else 0.0
        assert below - 1e-5 <= number <= float(sums[token]) + 1e-5


@pytest.mark.parametrize("temperature", [1.2, 0.0])
def test_the_last_answers_are_replaced_and_nothing_else(on_policy, temperature):
    trainer, _ = on_policy(max_steps=1, learning_rate=0, on_policy_temperature=temperature)
    window = window_of(trainer)
    before, state = [unpadded(batch) for batch in window], torch.get_rng_state()
    trainer.model.train()
    replaced = trainer._own.replace(window, 3, trainer._prepare_inputs)
    assert torch.equal(torch.get_rng_state(), state) and trainer.model.training
    assert [unpadded(batch) for batch in window] == before, "the window itself is left alone"
    trainer.model.eval()
    tokenizer, ended = trainer.tokenizer_to_save, []
    for number, (old, new) in enumerate(zip(window, replaced, strict=True)):
        assert new["images"] is old["images"]
        for row, (was, now) in enumerate(zip(before[number], unpadded(new), strict=True)):
            (prompt, prompt_labels), _, tail = parts(*was)
            assert now[0][: len(prompt)] == prompt and now[1][: len(prompt)] == prompt_labels
            answer = [label for label in now[1][len(prompt) :] if label != IGNORE]
            rest = now[0][len(prompt) + len(answer) :]
            assert now[0][len(prompt) : len(prompt) + len(answer)] == answer and len(answer) >= 1
            assert set(now[1][len(prompt) + len(answer) :]) <= {IGNORE}
            # Whole, with the end token and what the template puts behind it; or cut.
            complete = answer[-1] == tokenizer.eos_token_id
            assert rest == (tail if complete else []) and (complete or len(answer) == 6)
            assert tokenizer.eos_token_id not in answer[:-1] and tokenizer.pad_token_id not in answer
            ended.append(complete)
            assert int(new["own_answers"][row]) == sum(label != IGNORE for label in prompt_labels)
            place = number * trainer.args.per_device_train_batch_size + row
            numbers = draw(trainer.args.seed, 3, place, 6)[1]
            check_tokens(trainer.model, new, row, answer, numbers, temperature, tokenizer)
        found = new[facts.KEY]
        assert found.own_samples == found.samples == 4 and found.image_samples == old[facts.KEY].image_samples
        with torch.no_grad(), record_merge(trainer.model) as recorder:
            trainer.model(**{name: new[name] for name in ("input_ids", "attention_mask", "labels", "images")})
        assert found.answer_tokens == int(recorder.batch.answer_mask().sum())
        mine = recorder.batch.answer_mask().sum(dim=1) - new["own_answers"]
        assert found.own_tokens == int(mine.sum())
    assert any(ended)
    if temperature:
        assert not all(ended), "some answers are cut at the limit"
    again = trainer._own.replace(window, 3, trainer._prepare_inputs)
    assert [unpadded(batch) for batch in again] == [unpadded(batch) for batch in replaced]
    if temperature:
        other = trainer._own.replace(window, 4, trainer._prepare_inputs)
        assert [unpadded(batch) for batch in other] != [unpadded(batch) for batch in replaced]


def test_a_whole_answer_reads_as_if_it_had_been_in_the_data(on_policy):
    """Ids, labels and mask are those of the ordinary preprocessing of the conversation with the student's words."""
    from llava.train.train import preprocess, preprocess_multimodal

    trainer, _ = on_policy(max_steps=1, learning_rate=0)
    window = window_of(trainer, (8,))
    (batch,) = trainer._own.replace(window, 0, trainer._prepare_inputs)
    tokenizer, equal = trainer.tokenizer_to_save, 0
    for row, (ids, labels) in enumerate(unpadded(batch)):
        _, answer, _ = parts(ids, labels)
        text = tokenizer.decode(answer[:-1])
        if answer[-1] != tokenizer.eos_token_id or tokenizer(text).input_ids != answer[:-1]:
            continue  # cut, or of pieces that the tokenizer would put together otherwise
        record = trainer.train_dataset.list_data_dict[row]
        turns = [*record["conversations"][:-1], {"from": "gpt", "value": text}]
        sources = preprocess_multimodal([turns], trainer.train_dataset.data_args) if "image" in record else [turns]
        expected = preprocess(sources, tokenizer, has_image="image" in record)
        assert ids == expected["input_ids"][0].tolist() and labels == expected["labels"][0].tolist()
        equal += 1
    assert equal >= 3


def test_an_answer_ends_at_the_length_limit(on_policy, mixed, tmp_path):
    """And a prompt that reaches it keeps the data's answer, which is cut off as ever."""
    records = json.loads(mixed.read_text())
    (tmp_path / "two.json").write_text(json.dumps([records[5], records[0]]))
    trainer, _ = on_policy("free", data_path=tmp_path / "two.json", max_steps=1, learning_rate=0)
    ids, labels = unpadded(window_of(trainer, (2,))[0])[0]
    prompt = len(parts(ids, labels)[0][0]) + trainer.data_collator.visual_tokens - 1
    for room in (3, 0, -4):
        trainer, log = on_policy(
            f"{room}", data_path=tmp_path / "two.json", max_steps=1, learning_rate=0, model_max_length=prompt + room,
            on_policy_temperature=20.0,
        )  # fmt: skip
        window = window_of(trainer, (2,))
        (batch,) = trainer._own.replace(window, 0, trainer._prepare_inputs)
        with torch.no_grad(), record_merge(trainer.model) as recorder:
            trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels", "images")})
        assert recorder.batch.real.sum(dim=1).max() <= prompt + room
        answered = recorder.batch.answer_mask().sum(dim=1)
        assert batch[facts.KEY].answer_tokens == int(answered.sum())
        if room > 0:
            assert int(answered[0] - batch["own_answers"][0]) == batch[facts.KEY].own_tokens - int(answered[1]) == room
        else:
            assert int(batch["own_answers"][0]) == -1 and batch[facts.KEY].own_samples == 1
            assert unpadded(batch)[0] == unpadded(window[0])[0]
        assert log[0]["own_answers"] == (1.0 if room > 0 else 0.5)


LAYOUTS = ["qIqqIqaaqqa", "Iqqaqaa", "qqqaa", "qIqqqq", "qqIqqIqqIqaaa"]


@pytest.mark.parametrize("images", ["several", "text alone", "none", "unlike"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_several_images_text_alone_and_no_images(siglip, world, tmp_path, images, family):
    """Grouped-query attention, answers of samples of any kind, in smaller groups than the batch."""
    register()
    model = make_model(siglip, family, vocab=1024, dtype=torch.float32)
    layouts = LAYOUTS if images in ("several", "unlike") else ["qqqaa", "qaqqaaa", "qqqqa"]
    batch = make_batch(layouts, dtype=torch.float32).inputs
    if images == "none":
        del batch["images"]
    tokenizer = AutoTokenizer.from_pretrained(str(world["tokenizer"]))
    with under_template("qwen_1_5") as template:
        prepare_tokenizer(tokenizer, template)
        own = make_own_answers(model, tokenizer, tmp_path)
    own._at_once = 2
    given = batch
    if images == "unlike":  # as LLaVA's collator gives images of several crops
        given = {**batch, "images": [image[None] for image in batch["images"]]}
    given = {**given, facts.KEY: own.collator.facts(given)}
    (found,) = own.replace([given], 0, lambda inputs: inputs)
    answered = 0
    for row, layout in enumerate(layouts):
        if "a" not in layout:
            assert int(found["own_answers"][row]) == -1 and unpadded(found)[row] == unpadded(batch)[row]
            continue
        answered += 1
        (prompt, labels), _, _ = parts(*unpadded(batch)[row])
        ids, new_labels = unpadded(found)[row]
        assert ids[: len(prompt)] == prompt and new_labels[: len(prompt)] == labels
        answer = [label for label in new_labels[len(prompt) :] if label != IGNORE]
        numbers = draw(own.args.seed, 0, row, 6)[1]
        check_tokens(model, {**found, **({"images": batch["images"]} if "images" in batch else {})},
                     row, answer, numbers, 1.0, tokenizer)  # fmt: skip
    assert found[facts.KEY].own_samples == answered == len([layout for layout in layouts if "a" in layout])
    assert found[facts.KEY].own_tokens > answered


def make_own_answers(model, tokenizer, folder, **changes):
    from llava.train.train import DataCollatorForSupervisedDataset

    values = {"on_policy": 1.0, "on_policy_max_tokens": 6, "per_device_train_batch_size": 8, **changes}
    args = arguments(folder, **values)
    tokenizer.model_max_length = 512
    collator = CountingCollator(DataCollatorForSupervisedDataset(tokenizer=tokenizer), 16, None)
    return OwnAnswers(model, tokenizer, collator, args, None)


def test_fewer_at_a_time_where_the_gpus_memory_does_not_suffice(on_policy, monkeypatch, caplog):
    trainer, _ = on_policy(max_steps=1, learning_rate=0)
    window, answer = window_of(trainer, (4, 4)), OwnAnswers._answer
    expected = [unpadded(batch) for batch in trainer._own.replace(window, 0, trainer._prepare_inputs)]

    def small(self, samples, prepare):
        if len(samples) > 3:
            raise torch.cuda.OutOfMemoryError("too many")
        answer(self, samples, prepare)

    monkeypatch.setattr(OwnAnswers, "_answer", small)
    found = trainer._own.replace(window, 0, trainer._prepare_inputs)
    assert [unpadded(batch) for batch in found] == expected
    assert "out of GPU memory with 8 answers at once, going on with 4" in caplog.text and trainer._own._at_once == 2
    monkeypatch.setattr(
        OwnAnswers, "_answer", lambda self, samples, prepare: small(self, [*samples, 1, 2, 3], prepare)
    )
    with pytest.raises(torch.cuda.OutOfMemoryError):
        trainer._own.replace(window, 0, trainer._prepare_inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("encoders", ["one", "two"])
def test_own_answers_have_the_divergence_and_no_cross_entropy(siglip, tmp_path, monkeypatch, encoders, weighted):
    """Against whole logits, one sample at a time, gradients included; also where limits cut the models apart, and
    where the teacher's rows have weights (--visual_advantage)."""
    from factory import save_tower

    from llava_compodistill.methods.advantage import AdvantageTerm

    tower = siglip if encoders == "one" else save_tower(tmp_path / "siglip-4", patches=4)
    limit = {"tokenizer_model_max_length": 20} if encoders == "two" else {}
    teacher = make_model(siglip, hidden=48, layers=6, heads=6, vocab=128, seed=1, **limit).requires_grad_(False)
    student = make_model(tower, seed=2, **limit)
    options = {"vat": False, "lm_weight": 0.7, "kl_weight": 1.3, "kd_temperature": 2.0}
    if weighted:
        options["visual_advantage"] = "tokens"
        ramp = torch.linspace(0.5, 2.0, 90)
        monkeypatch.setattr(AdvantageTerm, "token_weights", lambda self, teacher: ramp[: len(teacher.log_probs)])
        monkeypatch.setattr(AdvantageTerm, "blind_needs", lambda self: None)  # 4.37 has no padding in float64
    objective = make_objective(student, teacher, arguments(tmp_path, **options), 91)
    layouts = ["qIqaaqaaa", "qqqaaqa", "Iqaaa", "qIaaaaaaaaaaaaaaaaaaa", "qq" + "a" * 28]
    own = torch.tensor([2, 2, 0, 4, -1])
    batch = make_batch(layouts)
    lm = kl = torch.zeros((), dtype=torch.float64)
    seen = 0
    for start, (ids, labels, first) in zip(own.tolist(), batch.samples, strict=True):
        inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        inputs["images"] = batch.inputs["images"][first : first + 1]
        logits = []
        for model in (student, teacher):
            with record_merge(model) as recorder:
                out = model(**inputs, use_cache=False).logits[0].double()
            mask = recorder.batch.answer_mask()[0]
            logits.append(out[mask])
            if model is student:
                targets = recorder.batch.answer_targets()
        given = len(targets) if start < 0 else start
        lm = lm + torch.nn.functional.cross_entropy(logits[0][:given], targets[:given], reduction="sum")
        both = min(map(len, logits))
        p, q = ((part[:both, :91] / 2).log_softmax(-1) for part in (logits[1], logits[0]))
        weights = ramp[seen : seen + both].double() if weighted else torch.ones(both, dtype=torch.float64)
        kl = kl + 4 * ((p.exp() * (p - q)).sum(-1) * weights).sum()
        seen += len(logits[1])
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(0.7 * lm + 1.3 * kl, trained)
    with objective.running():
        sums = objective(student, {**batch.inputs, facts.OWN: own})["answers"]
        torch.testing.assert_close(sums.logged["lm"].double(), lm.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(sums.logged["kl"].double(), kl.detach(), rtol=1e-5, atol=0)
        sums.loss.backward()
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9)
    with objective.running(), torch.no_grad():
        every = objective(student, batch.inputs)["answers"].logged["lm"]
    assert float(every) > float(lm.detach()) + 1, "another batch has labels alone again"


def test_a_step_is_counted_with_the_students_tokens(on_policy, monkeypatch):
    """The log and the loss of a run: sums of the replaced window over its answer tokens."""
    original, replaced = OwnAnswers.replace, []

    def keep(self, *args):
        replaced.extend(original(self, *args))
        return replaced

    monkeypatch.setattr(OwnAnswers, "replace", keep)
    trainer, log = on_policy(max_steps=1, learning_rate=0, per_device_train_batch_size=8, on_policy=0.6)
    trainer.model.eval()
    (batch,) = replaced
    counted = batch[facts.KEY]
    assert 0 < counted.own_samples < 8 and counted.own_samples == int((batch["own_answers"] >= 0).sum())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "images")}
    with torch.no_grad(), record_merge(trainer.model) as recorder:
        logits = trainer.model(**inputs, use_cache=False).logits.double()
    mask = recorder.batch.answer_mask()
    losses = torch.nn.functional.cross_entropy(logits[mask], recorder.batch.answer_targets(), reduction="none")
    number = mask.long().cumsum(dim=1)[mask] - 1
    owner = mask.nonzero()[:, 0]
    own = batch["own_answers"][owner]
    given = (own < 0) | (number < own)
    assert log[0]["lm"] == pytest.approx(float(losses[given].sum()) / len(losses), rel=1e-4)
    assert len(losses) == counted.answer_tokens and int((~given).sum()) == counted.own_tokens
    assert log[0]["own_answers"] == pytest.approx(counted.own_samples / 8, abs=1e-6)
    assert log[0]["own_tokens"] == pytest.approx(counted.own_tokens / counted.answer_tokens, abs=1e-5)
    assert log[0]["loss"] == pytest.approx(sum(log[0][name] for name in ("lm", "kl", "attention")), rel=1e-4)
    assert 0 < log[0]["generating"] < 1


def test_own_answers_alone_train_by_the_teacher(on_policy, mixed, tmp_path):
    """Nothing of the labels is left where every sample has one answer and that is the student's."""
    records = [record for record in json.loads(mixed.read_text()) if len(record["conversations"]) == 2]
    path = tmp_path / "one-turn.json"
    path.write_text(json.dumps(records))
    options = {**PLAIN, "data_path": path, "max_steps": 2}
    one, log = on_policy("one", **options)
    other, _ = on_policy("other", lm_weight=0.0, **options)
    assert all(entry["lm"] == 0 and entry["own_tokens"] == 1 and entry["kl"] > 0 for entry in log)
    assert_same_weights(trained_weights(one.model), trained_weights(other.model), 1e-7)


def test_sft_with_attention_aligned_has_it_on_own_answers(on_policy):
    options = {"stage": "sft", "attention_stages": "dft,sft", "max_steps": 1}
    _, log = on_policy("own", on_policy=0.5, per_device_train_batch_size=8, **options)
    _, data = on_policy("data", on_policy=0.0, on_policy_max_tokens=128, on_policy_temperature=1.0,
                        per_device_train_batch_size=8, **options)  # fmt: skip
    assert "kl" not in log[0] and log[0]["attention"] > 0 and 0 < log[0]["own_tokens"] < 1
    assert log[0]["attention"] != data[0]["attention"] and log[0]["lm"] < data[0]["lm"]
    assert log[0]["loss"] == pytest.approx(log[0]["lm"] + log[0]["attention"], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
def test_where_nothing_is_drawn_nothing_changes_by_one_bit(dft):
    plain, expected = dft("plain", max_steps=2)
    watched, found = dft("watched", max_steps=2, on_policy=1e-9)
    assert_same_weights(trained_weights(watched.model), trained_weights(plain.model), 0)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.pop("own_answers") == ours.pop("own_tokens") == 0 and ours.pop("generating") < 0.5
        assert ours == theirs


OWN_NAMES = ("own_answers", "own_tokens")


def test_accumulation_does_not_change_an_on_policy_step(on_policy):
    options = {**PLAIN, "max_steps": 3, "on_policy": 0.5}
    whole, expected = on_policy("whole", per_device_train_batch_size=4, **options)
    some, found = on_policy("some", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    assert_same_log(found, expected, 2e-4)
    for ours, theirs in zip(found, expected, strict=True):
        assert [ours[name] for name in OWN_NAMES] == [theirs[name] for name in OWN_NAMES]
    assert 0 < sum(entry["own_tokens"] for entry in expected) < 3
    assert_same_weights(trained_weights(some.model), trained_weights(whole.model), 2e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_on_policy_run_equals_an_unbroken_one(on_policy, monkeypatch, kind):
    """The learning rate makes the student another one at each step; LoRA's dropout draws from the training's state."""
    options = {"max_steps": 4, "on_policy": 0.5, "learning_rate": 1e-3}
    if kind == "full":
        options |= {"gradient_accumulation_steps": 2}
    else:
        options |= {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.1, "gradient_checkpointing": True}
    unbroken, expected = on_policy("unbroken", **options)
    resumed, found = killed_and_resumed(on_policy, monkeypatch, **options)
    assert_same_log(found, expected, 1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert [ours[name] for name in OWN_NAMES] == [theirs[name] for name in OWN_NAMES]
    assert_same_weights(trained_weights(resumed.model), trained_weights(unbroken.model), 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"attn_implementation": "eager", "method": "kd"},
        {"bf16": True, "lora_enable": True, "lora_r": 4, "gradient_checkpointing": True},
        {"mm_projector_type": "mlp2x_gelu", "group_by_modality_length": True, "attention_heads": "matched"},
    ],
    ids=lambda options: ",".join(options),
)
def test_other_ways_to_train(on_policy, options, caplog):
    trainer, log = on_policy(max_steps=2, **options)
    assert all(0 < entry["own_tokens"] <= 1 and entry["kl"] > 0 for entry in log)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert "the student gives the last answer of 100 % of the samples itself" in caplog.text
    assert "4 of 4 samples itself, with" in caplog.text and "% of the time" in caplog.text


def test_evaluation_is_on_the_data(on_policy, monkeypatch):
    from llava_compodistill.train import run

    original = run.make_data_module
    monkeypatch.setattr(
        run, "make_data_module", lambda *a: {**(module := original(*a)), "eval_dataset": module["train_dataset"]}
    )
    calls = []
    monkeypatch.setattr(OwnAnswers, "replace", lambda self, window, *args: calls.append(len(window)) or list(window))
    on_policy(
        max_steps=2, evaluation_strategy="steps", eval_steps=1, prediction_loss_only=True, per_device_eval_batch_size=4
    )
    assert calls == [1, 1], "once a step"


@pytest.mark.once
@pytest.mark.long
def test_two_processes_answer_what_one_does(ranks, on_policy, world, talker, sharp_teacher, mixed, tmp_path):
    from test_distributed import parallel_flags

    options = {"on_policy": 0.5, "on_policy_max_tokens": 6, "on_policy_temperature": 1.2, "max_steps": 2}
    single, expected = on_policy("one", gradient_accumulation_steps=2, **PLAIN, **options)
    options |= {"model_name_or_path": talker, "ddp_backend": "gloo"}
    flags = parallel_flags(world, sharp_teacher, mixed, tmp_path / "two", **options)
    printed = ranks.train_well(flags, 2, tmp_path / "log").text
    found = tiny.read_log(tmp_path / "two")
    assert_same_log(found, expected, 2e-4)
    for ours, theirs in zip(found, expected, strict=True):
        assert [ours[name] for name in OWN_NAMES] == [theirs[name] for name in OWN_NAMES]
    assert printed.count("of 8 samples itself") == 1
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "two" / "model.safetensors")
    weights = trained_weights(single.model)
    assert_same_weights({name: saved[name] for name in weights}, weights, 2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Facts
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.once
@pytest.mark.parametrize("limit, tokens, own", [(None, 9, 5), (21, 6, 2), (19, 5, 2), (4, 3, 1)])
def test_facts_count_own_tokens_up_to_the_limit(limit, tokens, own):
    batch = make_batch(["qIqaaqaaa", "qqqaa", "qqaa"]).inputs  # merged: 24, 5 and 4 positions
    batch[facts.OWN] = torch.tensor([2, 0, -1])
    found = BatchFacts.of(batch, 16, limit)
    assert (found.answer_tokens, found.own_tokens, found.own_samples) == (tokens, own, 2)
