"""A teacher with another tokenizer: aligned answers, and training with a Qwen student and a Llama teacher."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import factory
import pytest
import torch
from checks import PLAIN, assert_same_weights, trained_weights
from factory import make_batch, make_model
from transformers import AutoTokenizer

from llava_compodistill import compat
from llava_compodistill.errors import DataError
from llava_compodistill.hosts.llava import register
from llava_compodistill.hosts.token_bytes import TokenBytes
from llava_compodistill.pair.tokens import TEACHER, align_answers, shared_tokens
from llava_compodistill.train.arguments import TrainingArguments

register(train=True)

from llava_compodistill.hosts.llava.host import import_llava_train  # noqa: E402
from llava_compodistill.hosts.llava.reading import read_conversation  # noqa: E402
from llava_compodistill.hosts.llava.templates import current_template, prepare_tokenizer, use_template  # noqa: E402
from llava_compodistill.record.merge import record_merge  # noqa: E402
from llava_compodistill.record.sight import without_sight  # noqa: E402
from llava_compodistill.train.calibration import Calibration  # noqa: E402
from llava_compodistill.train.objective import Objective  # noqa: E402
from llava_compodistill.train.teacher_text import _can_read  # noqa: E402

IGNORE = -100
WORDS = "a red square above a blue circle\nUSER: What color is it? ASSISTANT: Red\nHow many objects are there?\n"


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return factory.make_llama_tokenizer(tmp_path_factory.mktemp("llama") / "tokenizer", True, WORDS * 20, 340)


def load(folder, version):
    tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=False, model_max_length=512, padding_side="right")
    prepare_tokenizer(tokenizer, use_template(version))
    return tokenizer


@pytest.fixture(autouse=True)
def default_template(monkeypatch):
    from llava import conversation

    monkeypatch.setattr(conversation, "default_conversation", conversation.default_conversation)


@pytest.fixture(scope="module")
def qwen(world):
    return load(world["tokenizer"], "qwen_1_5")


@pytest.fixture(scope="module")
def llama(llama_folder):
    return load(llama_folder, "v1")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and bytes
# ---------------------------------------------------------------------------------------------------------------------
TEXTS = ["Red", "a red  square", "  two\n\nlines ", "日本語 Über 12,5%", "🟥 is 🔴👨‍👩‍👧", "tabs\tand\r\nreturns", "x"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_the_text(qwen, llama, text):
    for tokenizer in (qwen, llama):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        pieces = TokenBytes(tokenizer)([*ids, tokenizer.eos_token_id, -200])
        assert len(pieces) == len(ids) + 2 and pieces[-2:] == [b"", b""] and all(pieces[:-2])
        found = b"".join(pieces).decode()
        assert found == text or found == f" {text}", "SentencePiece puts a space before a text"


def test_a_tokenizer_of_another_kind_is_named():
    from test_templates import spare_tokenizer

    with pytest.raises(ValueError, match="of .* is neither byte-level BPE .* nor SentenceP"):
        TokenBytes(spare_tokenizer())


# ---------------------------------------------------------------------------------------------------------------------
# Aligned answers
# ---------------------------------------------------------------------------------------------------------------------
CONVERSATIONS = {
    "one word": ["Red"],
    "sentences": ["a red square above a blue circle. What?"],
    "turns": ["Red", "a blue circle", "2"],
    "empty": ["", "Red", ""],
    "characters of several bytes": ["Über 日本語", "🟥🔴 and 👨‍👩‍👧 it"],
    "spaces": ["a  red   square", "  leading", "trailing  ", "\nnew\n\n line", "   "],
    "like the prompt": ["ASSISTANT: Red", "USER: What", "system"],
}


def conversation(answers, image):
    turns = []
    for number, answer in enumerate(answers):
        question = "What color is it?" if number else "<image>\nHow many?" if image else "How many?"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


def both(qwen, llama, turns, image, versions=("qwen_1_5", "v1")):
    """(ids, labels) of both readings, and their alignment."""
    readings = [
        read_conversation(turns, image, tokenizer, TokenBytes(tokenizer), version)
        for tokenizer, version in zip((qwen, llama), versions, strict=True)
    ]
    return *readings, align_answers(*readings, TokenBytes(qwen), TokenBytes(llama)).tolist()


def rows_of(tokenizer, ids, labels):
    """For each answer row: the number of its answer, its token, and the text of the answer before it as the tokenizer
    decodes it; None for white space around the answer, which may be the template's."""
    runs, before = [], IGNORE
    for index, label in zip(ids.tolist(), labels.tolist(), strict=True):
        if label != IGNORE:
            assert label == index
            runs += [[]] if before == IGNORE else []
            runs[-1].append(index)
        before = label
    rows = []
    for number, run in enumerate(runs):
        ended = run[-1] == tokenizer.eos_token_id
        words = run[: len(run) - ended]
        for place, index in enumerate(run):
            start, end = (tokenizer.decode(words[:count]).lstrip() for count in (place, place + 1))
            if index == tokenizer.eos_token_id:
                rows.append((number, index, start.rstrip()))
            else:
                is_blank = not end or (ended and not tokenizer.decode(words[place:]).strip())
                rows.append((number, index, None if is_blank else start))
    return rows


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_aligned_rows_follow_the_same_text(qwen, llama, name, image):
    """Exactly those. Where a prefix ends inside a character, decoding cannot tell how far it has come."""
    answers = CONVERSATIONS[name]
    mine, theirs, aligned = both(qwen, llama, conversation(answers, image), image)
    mine, theirs = rows_of(qwen, *mine), rows_of(llama, *theirs)
    for i, (number, _, before) in enumerate(mine):
        for j, (other, _, text) in enumerate(theirs):
            if "\ufffd" in ((before or "")[-1:], (text or "")[-1:]):
                assert [i, j] not in aligned or (number == other and before[-1:] == text[-1:] == "\ufffd")
            else:
                assert ([i, j] in aligned) == (number == other and before is not None and before == text), (i, j)
    ends = [[i for i, row in enumerate(rows) if row[1] == tokenizer.eos_token_id]
            for rows, tokenizer in ((mine, qwen), (theirs, llama))]  # fmt: skip
    assert [pair for pair in aligned if pair[0] in ends[0]] == [list(pair) for pair in zip(*ends, strict=True)]
    assert len(ends[0]) == len(answers)


def test_spans_as_one_would_mark_them(qwen, llama):
    """a| red| square of the one are a| r-ed| s-q-u-a-r-e of the other, as its vocabulary has it."""
    mine, theirs, aligned = both(qwen, llama, conversation(["a red square"], True), True)
    rows = [rows_of(tokenizer, *reading) for tokenizer, reading in ((qwen, mine), (llama, theirs))]
    texts = [[before for _, _, before in found] for found in rows]
    assert texts[0] == ["", "a", "a red", "a red square"]
    assert [(texts[0][i], texts[1][j]) for i, j in aligned] == [(text, text) for text in texts[0]]


def test_text_that_a_tokenizer_changes_is_aligned_around_the_change(qwen, llama):
    """Qwen's composes Unicode characters (NFC)."""
    mine, theirs, aligned = both(qwen, llama, conversation(["a cafe\u0301 is red"], False), False)
    found = [(rows_of(qwen, *mine)[i][2], rows_of(llama, *theirs)[j][2]) for i, j in aligned]
    assert ("a", "a") in found and found[-1][0] == "a caf\u00e9 is red" and found[-1][1] == "a cafe\u0301 is red"
    assert ("a caf\u00e9 is", "a cafe\u0301 is") in found


def test_other_text_is_not_aligned(qwen, llama):
    reading = [
        read_conversation(conversation([text], False), False, tokenizer, TokenBytes(tokenizer), version)
        for text, tokenizer, version in (("a red square", qwen, "qwen_1_5"), ("Below!", llama, "v1"))
    ]
    assert align_answers(*reading, TokenBytes(qwen), TokenBytes(llama)).tolist() == []


@pytest.mark.parametrize("kept", [0, 5, 12])
def test_a_reading_that_was_cut(qwen, llama, kept):
    """Here by its tokenizer, as LLaVA cuts text without images: what is there is aligned as before."""
    turns = conversation(["a red square", "What color is it?"], False)
    mine, theirs, whole = both(qwen, llama, turns, False)
    starts = (theirs[1] != IGNORE).nonzero().flatten()
    cut = [part[: int(starts[kept])] for part in theirs]
    found = align_answers(mine, cut, TokenBytes(qwen), TokenBytes(llama)).tolist()
    assert found == [pair for pair in whole if pair[1] < kept]


def test_templates_and_tokenizers_in_the_other_order(qwen, llama):
    """A Llama student of a Qwen teacher; and captions, whose end is a line's."""
    turns = conversation(["a red square", ""], True)
    *_, aligned = both(qwen, llama, turns, True)
    *_, swapped = both(llama, qwen, turns, True, ("v1", "qwen_1_5"))
    assert swapped == [[j, i] for i, j in aligned]
    mine, theirs, spaced = both(qwen, llama, turns, True, ("qwen_1_5", "mistral_instruct"))
    assert len(spaced) == len(aligned), "white space before the end token is the template's"
    caption = conversation(["a red square"], True)
    mine, theirs, plain = both(qwen, llama, caption, True, ("plain", "plain"))
    assert plain[0] == [0, 0] and plain[-1] == [len(rows_of(qwen, *mine)) - 1, len(rows_of(llama, *theirs)) - 1]


@pytest.mark.parametrize("name", ["one word", "turns"])
def test_a_teacher_reads_what_llava_trains_on(llama, name):
    turns = conversation(CONVERSATIONS[name], True)
    ids, labels = read_conversation(turns, True, llama, TokenBytes(llama), "v1")
    use_template("v1")
    train = import_llava_train()
    sources = train.preprocess_multimodal([turns], SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False))
    expected = train.preprocess(sources, llama, has_image=True)
    assert torch.equal(ids, expected["input_ids"][0])
    apart = ids[labels != expected["labels"][0]].tolist()
    assert set(llama.convert_ids_to_tokens(apart)) <= {"\u2581"}, "the space before an answer"


def test_reading_leaves_the_students_template(qwen, llama):
    use_template("qwen_1_5")
    turns = conversation(["Red"], True)
    read_conversation(turns, True, llama, TokenBytes(llama), "v1")
    assert current_template() == "qwen_1_5" and turns == conversation(["Red"], True)
    with pytest.raises(ValueError, match="template 'v1' .TWO. with Qwen2Tokenizer ends 0 of 1 answers"):
        read_conversation(turns, True, qwen, TokenBytes(qwen), "v1")
    assert current_template() == "qwen_1_5"


# ---------------------------------------------------------------------------------------------------------------------
# Terms on a pair, against whole logits and maps
# ---------------------------------------------------------------------------------------------------------------------
LAYOUTS = ["qqIqaaqaa", "qIqa", "qqaaa", "Iqqaaaa"]
THEIRS = ["qIqqaaaqa", "qqIqqaa", "qaa", "IqIqaa"[1:] + "a"]
#: Answer rows of the student and of the teacher that correspond; -1 pads. The last of the first and third samples lie
#: beyond a cut.
ALIGNED = [[[0, 0], [1, 2], [2, 3], [3, 9]], [[0, 1], [-1, -1], [-1, -1], [-1, -1]],
           [[0, 0], [2, 1], [7, 1], [-1, -1]], [[0, 0], [1, 1], [3, 2], [-1, -1]]]  # fmt: skip
VOCABS = (91, 117)  # the heads have 96 and 128 rows


@pytest.fixture
def pair(siglip, monkeypatch):
    # transformers 4.37 fills eager attention's mask with float64's smallest number in torch's default dtype.
    monkeypatch.setattr(torch, "full", partial(torch.full, dtype=torch.float64))
    teacher = make_model(siglip, "llama", hidden=48, layers=6, heads=6, kv_heads=6, vocab=128, seed=1,
                         attention="eager")  # fmt: skip
    return make_model(siglip, seed=2, attention="eager"), teacher.requires_grad_(False)


def paired_batch():
    """The same images to both; text of one length here and another there."""
    mine, theirs = make_batch(LAYOUTS), make_batch(THEIRS, vocab=110, seed=5)
    other = {name: value for name, value in theirs.inputs.items() if name != "images"}
    return {**mine.inputs, TEACHER: {**other, "aligned": torch.tensor(ALIGNED)}, "use_cache": False}


def whole(model, inputs):
    with record_merge(model) as recorder:
        outputs = model(**inputs, use_cache=False, output_attentions=True, output_hidden_states=True)
    return outputs, recorder.batch


def run(pair, folder, method="compodistill", **changes):
    """The sums of a method's terms in the dft stage, and both models' whole passes."""
    values = {"stage": "dft", "use_cpu": True, "report_to": "none", "method": method}
    values |= {"student_layers": "0,2,3", "teacher_layers": "1,2,3,4,5", **changes}
    args = TrainingArguments(str(folder), **values)
    torch.manual_seed(3)
    objective = Objective(*pair, args.chosen_method.terms("dft", args), VOCABS[0], teacher_vocab_size=VOCABS[1])
    for module in objective.modules.values():
        module.double()
    batch = paired_batch()
    with objective.running():
        sums = objective(pair[0], batch)
        sum(found.loss for found in sums.values()).backward()
        for found in sums.values():
            found.loss = found.loss.detach()
    mine = {name: value for name, value in batch.items() if name not in (TEACHER, "use_cache")}
    theirs = {**batch[TEACHER], "images": batch["images"]}
    theirs.pop("aligned")
    return objective, sums, whole(pair[0], mine), whole(pair[1], theirs)


def corresponding(mine, theirs, aligned=ALIGNED):
    """(sample, row of the student, row of the teacher) of what is aligned and both have."""
    found = []
    for sample, pairs in enumerate(aligned):
        rows = [
            [place - 1 for place, label in enumerate(batch.labels[sample].tolist()) if label != IGNORE]
            for batch in (mine, theirs)
        ]
        found += [(sample, rows[0][i], rows[1][j]) for i, j in pairs if 0 <= i < len(rows[0]) and j < len(rows[1])]
    return found


def universal(mine, theirs, aligned=ALIGNED, vocabs=VOCABS):
    """L_ULD of the corresponding rows, summed, on whole logits."""
    total = 0
    for sample, row, other in corresponding(mine[1], theirs[1], aligned):
        p = mine[0].logits[sample, row, : vocabs[0]].softmax(0).sort(descending=True).values
        q = theirs[0].logits[sample, other, : vocabs[1]].softmax(0).sort(descending=True).values.detach()
        more = len(q) - len(p)
        p, q = torch.cat([p, p.new_zeros(max(0, more))]), torch.cat([q, q.new_zeros(max(0, -more))])
        total = total + (p - q).abs().sum()
    return total


def cross_entropy(mine):
    outputs, batch = mine
    rows = batch.labels[:, 1:] != IGNORE
    logits = outputs.logits[:, :-1][rows]
    return torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:][rows], reduction="sum")


def attention_loss(mine, theirs, layer, group, pairs):
    """1 - cosine of each corresponding query over the visual tokens: means over the sample's queries."""
    losses = []
    for sample in range(len(LAYOUTS)):
        keys, others = (batch.visual[sample].nonzero().flatten() for batch in (mine[1], theirs[1]))
        queries = [*zip(keys.tolist(), others.tolist(), strict=True)]
        queries += [(row, other) for number, row, other in pairs if number == sample]
        queries = [(row, other) for row, other in queries if len(keys) and row >= keys[0]]
        cosines = []
        for row, other in queries:
            a = mine[0].attentions[layer][sample].mean(0)[row, keys]
            b = torch.stack([theirs[0].attentions[t][sample].mean(0)[other, others] for t in group]).mean(0).detach()
            cosines.append(1 - a @ b / (a.norm() * b.norm()))
        losses += [sum(cosines) / len(cosines)] if cosines else []
    assert len(losses) == 3
    return sum(losses)


def assert_same_gradients(student, expected):
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    expected.backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            # float32 sums inside the chunked op
            torch.testing.assert_close(
                found[name], parameter.grad, atol=2e-6, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_compodistill_on_whole_logits_and_maps(pair, tmp_path):
    objective, sums, mine, theirs = run(pair, tmp_path)
    assert [term.name for term in objective.terms] == ["answers", "uld", "attention"]
    assert [term.weight for term in objective.terms] == [1.0, 1.5, 1.0]
    lm, uld = cross_entropy(mine), universal(mine, theirs)
    pairs = corresponding(mine[1], theirs[1])
    assert len(pairs) == 9
    groups = {0: (1, 2, 3), 2: (2, 3, 4), 3: (3, 4, 5)}
    attention = sum(attention_loss(mine, theirs, *match, pairs) for match in groups.items()) / 3
    for name, value in {"answers": lm, "uld": uld, "attention": attention}.items():
        assert float(sums[name].loss) == pytest.approx(value.item(), rel=1e-6), name
    assert sums["answers"].logged.keys() == {"lm"} and float(sums["uld"].loss) > 0.1
    assert_same_gradients(pair[0], lm + uld + attention)


def test_weights_and_temperature(pair, tmp_path):
    objective, sums, mine, theirs = run(pair, tmp_path, "kd", kl_weight=2.0, kd_temperature=3.0)
    assert objective.term("uld").weight == 3.0
    for outputs, _ in (mine, theirs):
        outputs.logits = outputs.logits / 3
    assert float(sums["uld"].loss) == pytest.approx(universal(mine, theirs).item(), rel=1e-6)


def test_heads_are_matched(pair, tmp_path):
    objective, sums, *_ = run(pair, tmp_path, attention_heads="matched")
    assert 0 < float(sums["attention"].loss) < 3
    objective.use(objective.calibrate([paired_batch()]))
    assert len({tuple(heads) for layer in objective.term("attention").assigned for heads in layer}) > 4


def test_the_sight_of_layers_is_measured_on_each_models_own_text(pair, tmp_path):
    objective, *_ = run(pair, tmp_path)
    batch = paired_batch()
    theirs = {name: value for name, value in batch[TEACHER].items() if name != "aligned"}
    texts = {"student": batch, "teacher": {**theirs, "images": batch["images"]}}
    data = Calibration(objective, [], [batch] * 3)
    for of, model in zip(("student", "teacher"), pair, strict=True):
        costs = []
        for layers in ([], [1]):
            inputs = {name: texts[of][name] for name in ("input_ids", "labels", "attention_mask", "images")}
            with record_merge(model) as recorder, without_sight(model, layers, lambda at=recorder: at.batch):
                logits = model(**inputs, use_cache=False).logits.detach()
            asked, has_image = recorder.batch.answer_mask(), recorder.batch.has_image
            losses = torch.zeros(asked.shape, dtype=logits.dtype)
            losses[asked] = torch.nn.functional.cross_entropy(
                logits[asked], recorder.batch.answer_targets(), reduction="none"
            )
            costs.append((losses.sum(1) / asked.sum(1))[has_image])
        found = data.sight(of)
        assert found.samples == 3 * len(costs[0]) == 9 and len(found.nats) == model.config.num_hidden_layers
        assert found.nats[1] == pytest.approx(float((costs[1] - costs[0]).mean()), rel=1e-3, abs=1e-6)


def test_relations_of_visual_tokens(pair, tmp_path):
    """L_rel of LLaVA-KD needs no common vocabulary."""
    _, sums, mine, theirs = run(pair, tmp_path, "llava_kd", method_options='{"beta": 0}')
    expected = 0
    for sample in (0, 1, 3):
        grams = []
        for (outputs, batch), size in ((mine, VOCABS[0]), (theirs, VOCABS[1])):
            logits = outputs.logits[sample, batch.visual[sample], :size]
            grams.append(logits @ logits.T)
        expected = expected + 1 - (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    assert sums.keys() == {"answers", "uld", "relation"}
    assert float(sums["relation"].loss) == pytest.approx(expected.item(), rel=1e-5)


def test_the_released_attention_loss_takes_each_models_own_places(pair, tmp_path):
    from test_rivals import release_reference

    _, sums, mine, theirs = run(pair, tmp_path, "release", kl_weight=0.0)
    expected = 0
    for layer, group in {0: (1, 2, 3), 2: (2, 3, 4), 3: (3, 4, 5)}.items():
        for sample in (0, 1, 3):
            maps = []
            for (outputs, batch), layers in ((mine, (layer,)), (theirs, group)):
                keys = batch.visual[sample].nonzero().flatten()
                maps.append(
                    torch.stack([outputs.attentions[t][sample].mean(0)[keys][:, keys] for t in layers]).mean(0)
                )
            expected = expected + release_reference(*maps)
    assert float(sums["attention"].loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "method, terms, way",
    [
        ("llava_kd", "visual_kl", '"beta": 0}\' leaves out visual_kl'),
        ("llavadi", "features", "--method kd or compodistill"),
        ("align_kd", "first_attention", "--method kd or compodistill"),
        ("release", "kl", "--kl_weight 0 leaves out kl"),
        ("toy_method:Toy", "features", "--method kd or compodistill"),
    ],
)
def test_terms_that_compare_text_are_named(pair, tmp_path, method, terms, way):
    with pytest.raises(ValueError, match=rf"(?s)terms that compare .* one by one: {terms}\..*{way}"):
        run(pair, tmp_path, method)


def test_a_batch_without_the_teachers_reading_is_named(pair, tmp_path):
    args = TrainingArguments(str(tmp_path), stage="dft", method="kd", use_cpu=True, report_to="none")
    objective = Objective(*pair, args.chosen_method.terms("dft", args), VOCABS[0], teacher_vocab_size=VOCABS[1])
    with pytest.raises(ValueError, match="lacks the teacher's tokens: give make_data_module"), objective.running():
        objective(pair[0], {**make_batch(LAYOUTS).inputs, "use_cache": False})


# ---------------------------------------------------------------------------------------------------------------------
# In training
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def llama_teacher(world, llama_folder, tmp_path_factory):
    """A random LLaVA checkpoint of Llama's kind over the world's tower."""
    model = make_model(
        world["siglip"], "llama", hidden=48, layers=6, heads=6, kv_heads=6, vocab=352, dtype=torch.float32, seed=4,
        mm_hidden_size=json.loads((world["siglip"] / "config.json").read_text())["hidden_size"],
    )  # fmt: skip
    return factory.checkpoint_folder(tmp_path_factory.mktemp("teacher") / "llava-llama", model, llama_folder)


@pytest.fixture
def other(dft, llama_teacher):
    return partial(dft, teacher_model_path=llama_teacher, per_device_train_batch_size=4)


@pytest.mark.parametrize("method", ["kd", "compodistill"])
def test_a_pair_trains_and_accumulates(other, caplog, method):
    options = {**PLAIN, "method": method, "max_steps": 2, "sight_steps": 2}
    trainer, log = other("whole", **options)
    assert caplog.text.count("The tokenizers differ: L_KL is left out. L_ULD stands for it, weight 1.5") == 1
    assert caplog.text.count("under the template v1 (that of llava_llama") == 1
    assert caplog.text.count("queries of prompts are left out") == (method == "compodistill")
    names = {"lm", "uld", *(["attention"] if method == "compodistill" else [])}
    for entry in log:
        assert names <= entry.keys() and "kl" not in entry and all(math.isfinite(entry[name]) for name in names)
        total = entry["lm"] + 1.5 * entry["uld"] + entry.get("attention", 0)
        assert entry["loss"] == pytest.approx(total, rel=1e-3) and 0 < entry["uld"] < 2
    assert log[1]["uld"] != log[0]["uld"] and "sight" in log[1]
    samples = [trainer.train_dataset[index] for index in range(8)]
    spans = trainer.data_collator(samples)["facts"].aligned_spans
    assert spans == sum(len(sample[TEACHER]["aligned"]) for sample in samples)
    assert 16 < spans < sum(int((sample[TEACHER]["labels"] != IGNORE).sum()) for sample in samples)
    parts, found = other("parts", **{**options, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})
    for ours, theirs in zip(found, log, strict=True):
        assert [ours[name] for name in sorted(names)] == pytest.approx(
            [theirs[name] for name in sorted(names)], rel=2e-4
        )
    assert_same_weights(trained_weights(parts.model), trained_weights(trainer.model), 2e-5)


@pytest.mark.parametrize("limit", [180, 70])
def test_spans_are_counted_where_both_models_have_them(other, caplog, limit):
    """As many as are compared, with limits that cut some of the teacher's answers, or all of them."""
    trainer, log = other(model_max_length=limit, max_steps=1, method="kd", blind="off")
    samples = [trainer.train_dataset[index] for index in range(8)]
    batch = trainer.data_collator(samples)
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model.eval(), batch))
        facts = batch.pop("facts")
        mine = whole(trainer.objective.pair.student, {k: v for k, v in batch.items() if k != TEACHER})
        theirs = {k: v for k, v in batch[TEACHER].items() if k != "aligned"}
        theirs = whole(trainer.objective.teacher, {**theirs, "images": batch["images"]})
        spans = [sample[TEACHER]["aligned"].tolist() for sample in samples]
        total = universal(mine, theirs, spans, (646, 340))
        lm = cross_entropy(mine) / facts.answer_tokens
    counted = facts.aligned_spans
    assert counted == len(corresponding(mine[1], theirs[1], spans)) < min(sum(map(len, spans)), facts.answer_tokens)
    assert (limit == 70) == (counted == 0)
    assert found == pytest.approx(float(lm + 1.5 * total / max(1, counted)), rel=1e-4), "the mean over spans"
    assert caplog.text.count(f"Either --model_max_length {limit} has cut them") == (limit == 70)
    assert log[0]["uld"] == 0 if limit == 70 else log[0]["uld"] > 0


def test_dpt_and_another_template(other, world, siglip, caplog):
    """Also with another tower, whose maps are resampled."""
    captions = {"version": "plain", "data_path": world["data"] / "pretrain.json"}
    _, log = other(stage="dpt", mm_projector_type="taf", max_steps=1, **captions)
    assert 0 < log[0]["uld"] < 2 and "under the template plain (as --version plain" in caplog.text
    options = {"layer_matching": "adaptive", "gradient_checkpointing": True, "bf16": True, "lora_enable": True}
    options["vision_tower"] = siglip
    trainer, log = other("named", teacher_version="vicuna_v1", max_steps=1, blind="off", **options)
    assert 0 < log[0]["uld"] < 2 and 0 < log[0]["attention"] < 1
    assert "under the template vicuna_v1 (--teacher_version)" in caplog.text
    assert trainer.train_dataset.teacher.template == "vicuna_v1"
    assert "maps are resampled from 9 to 16 patches" in caplog.text


def test_what_does_not_fit_is_said_before_weights_are_read(other, dft, llama_teacher, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr("llava_compodistill.train.run.load_teacher", load)
    with pytest.raises(ValueError, match="one by one: visual_kl"):
        other(method="llava_kd")
    with pytest.raises(ValueError, match="--visual_advantage tokens: the teacher's tokenizer is not the student's"):
        other(visual_advantage="tokens")
    with pytest.raises(ValueError, match="--teacher_version v1: the teacher shares the student's tokenizer"):
        dft(teacher_version="v1")
    with pytest.raises(ValueError, match="--teacher_version v1: no teacher reads samples in --stage sft"):
        dft(stage="sft", teacher_version="v1", teacher_model_path=None)
    with pytest.raises(ValueError, match="(?s)teacher's template .--teacher_version.: 'v9' is no conversation templ"):
        other(teacher_version="v9")
    with pytest.raises(ValueError, match="(?s)The template 'v0' does not fit the teacher's tokenizer .*--teacher_v"):
        other(teacher_version="v0")


def test_a_shared_tokenizer_gives_the_batches_of_before(dft, mixed):
    trainer, _ = dft(max_steps=1)
    assert trainer.train_dataset.teacher is None and trainer.objective.pair.shares_tokenizer
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    assert batch.keys() == {"input_ids", "labels", "attention_mask", "images", "facts"}
    assert batch["facts"].aligned_spans == 0


def test_analyses_that_compare_text_are_refused(qwen, llama):
    from llava_compodistill.analysis.experiments import intervene, similarity_by_layer

    engines = [SimpleNamespace(tokenizer=tokenizer) for tokenizer in (llama, qwen)]
    for compare in (similarity_by_layer, intervene):
        with pytest.raises(DataError, match="have different tokenizers .* knockout and overlay look at one"):
            compare(*engines, [])


def test_tokens_added_at_the_end_make_no_other_tokenizer(world, dft, sharp_teacher, tmp_path):
    """As those of Qwen2.5, which Qwen1.5 lacks: L_KL runs over what both have."""
    student = AutoTokenizer.from_pretrained(str(world["qwen-student"]))
    teacher = AutoTokenizer.from_pretrained(str(sharp_teacher))
    size = len(teacher)
    student.add_tokens(["<tool>", "</tool>"])
    assert shared_tokens(student, teacher) == shared_tokens(teacher, student) == size < len(student)
    teacher.add_tokens(["<other>"])
    assert shared_tokens(student, teacher) is None
    model = shutil.copytree(world["qwen-student"], tmp_path / "student")
    student.save_pretrained(model)
    compat.make_tokenizer_portable(model)
    trainer, log = dft(model_name_or_path=model, method="kd", max_steps=1)
    assert trainer.objective.pair.vocab_size == size and log[0]["kl"] > 0
    # Not where the teacher's embedding ends before them, or where they are LLaVA's markers of every image.
    config, markers = SimpleNamespace(vocab_size=size + 1), AutoTokenizer.from_pretrained(str(sharp_teacher))
    assert _can_read(SimpleNamespace(vocab_size=size + 2), student, teacher) and not _can_read(
        config, student, teacher
    )
    markers.add_tokens(["<im_start>"])
    assert not _can_read(config, markers, AutoTokenizer.from_pretrained(str(sharp_teacher)))
