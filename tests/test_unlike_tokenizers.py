"""A teacher with another tokenizer: aligned answers, and training with a Qwen student and a Llama teacher."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import factory
import pytest
import tiny
import torch
from checks import PLAIN, assert_same_weights, trained_weights
from factory import make_batch, make_model
from transformers import AutoTokenizer

from llava_compodistill.hosts.llava import register
from llava_compodistill.hosts.token_bytes import TokenBytes
from llava_compodistill.pair.tokens import TEACHER, align_answers, first_difference
from llava_compodistill.train.arguments import ModelArguments, TrainingArguments

register(train=True)

from llava_compodistill.hosts.llava.host import import_llava_train  # noqa: E402
from llava_compodistill.hosts.llava.reading import read_conversation  # noqa: E402
from llava_compodistill.hosts.llava.templates import current_template, prepare_tokenizer, use_template  # noqa: E402
from llava_compodistill.record.merge import record_merge  # noqa: E402
from llava_compodistill.train import teacher_text  # noqa: E402
from llava_compodistill.train.data import CheckedDataset, make_data_module  # noqa: E402
from llava_compodistill.train.objective import Objective  # noqa: E402

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
    decodes it; None for white space before the answer, which is the template's."""
    rows, run, number = [], None, -1
    for index, label in zip(ids.tolist(), labels.tolist(), strict=True):
        if label == IGNORE:
            run = None
            continue
        assert label == index
        if run is None:
            run, number = [], number + 1
        before, through = (tokenizer.decode(part).lstrip() for part in (run, [*run, index]))
        rows.append((number, index, before if through or index == tokenizer.eos_token_id else None))
        run.append(index)
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
            if before is not None and before.endswith("\ufffd"):
                assert [i, j] not in aligned or (number == other and text.endswith("\ufffd"))
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
