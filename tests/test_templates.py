"""Conversation templates: training sees what evaluation asks, labels are the answers, padding is no end token."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from llava_compodistill.hosts.llava import register
from llava_compodistill.hosts.llava.host import import_llava_train

register(train=True)

from llava import conversation  # noqa: E402
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX  # noqa: E402
from llava.mm_utils import tokenizer_image_token  # noqa: E402

from llava_compodistill.errors import SampleError  # noqa: E402
from llava_compodistill.hosts.llava.templates import current_template, prepare_tokenizer, use_template  # noqa: E402


# ---------------------------------------------------------------------------------------------------------------------
# Conversations
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(str(world["tokenizer"]), use_fast=False)


@pytest.fixture
def template(monkeypatch):
    monkeypatch.setattr(conversation, "default_conversation", conversation.default_conversation)
    return use_template


CONVERSATIONS = {
    "one round": [("What color is the square?", "Red")],
    "rounds": [
        ("How many?", "2 objects"),
        ("Where is it? Left, or right?", "left of a red circle"),
        ("Sure?", "Yes."),
    ],
    "odd text": [(" two  spaces\nand a line", "Über 12,5%\n\n- a\n- b"), ("日本語?", "  leading")],
    "newline first": [("\nWhat?", "\nRed")],
}


def turns(rounds, image=False):
    out = []
    for number, (question, answer) in enumerate(rounds):
        question = f"<image>\n{question}" if image and number == 0 else question
        out += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return out


def prompt_of(version, rounds, image, answered=None):
    """LLaVA's own prompt; the last answer open when `answered` rounds are given."""
    conv = conversation.conv_templates[version].copy()
    for number, turn in enumerate(turns(rounds, image)):
        if answered is not None and number > 2 * answered:
            conv.append_message(conv.roles[1], None)
            break
        conv.append_message(conv.roles[number % 2], turn["value"])
    return conv.get_prompt()


def tokens_of(tokenizer, text, image):
    return tokenizer_image_token(text, tokenizer) if image else tokenizer(text).input_ids


def preprocess(version, sources, tokenizer, image):
    use_template(version)
    return import_llava_train().preprocess(sources, tokenizer, has_image=image)


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("rounds", CONVERSATIONS)
@pytest.mark.parametrize("version", ["qwen_1_5", "qwen_2", "qwen_base"])
def test_training_sees_what_evaluation_asks(template, tokenizer, version, rounds, image):
    conversation_rounds = CONVERSATIONS[rounds]
    batch = preprocess(version, [turns(conversation_rounds, image)], tokenizer, image)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert len(ids) == len(labels) and ids.count(IMAGE_TOKEN_INDEX) == int(image)
    if rounds != "newline first":  # there an answer is generated after a prompt that has ended, and tokenized so
        assert ids == tokens_of(tokenizer, prompt_of(version, conversation_rounds, image), image)
    # What is asked for each answer is what stands before it.
    starts = [p for p, label in enumerate(labels) if label != IGNORE_INDEX and labels[p - 1] == IGNORE_INDEX]
    assert len(starts) == len(conversation_rounds)
    for number, start in enumerate(starts):
        if number == 0 or rounds != "newline first":
            asked = prompt_of(version, conversation_rounds, image, answered=number)
            assert ids[:start] == tokens_of(tokenizer, asked, image)


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("version, end", [("qwen_1_5", "<|im_end|>"), ("qwen_base", "<|endoftext|>")])
def test_labels_are_exactly_the_answers_and_their_end_tokens(template, tokenizer, version, end, image):
    for rounds in CONVERSATIONS.values():
        batch = preprocess(version, [turns(rounds, image)], tokenizer, image)
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
        space = " " if version == "qwen_base" else ""  # LLaVA puts it between "ASSISTANT:" and the answer
        expected = [tokenizer(space + answer, add_special_tokens=False).input_ids for _, answer in rounds]
        end_token = tokenizer.convert_tokens_to_ids(end)
        learned = [label for label in labels if label != IGNORE_INDEX]
        assert learned == [token for answer in expected for token in [*answer, end_token]]


def test_a_conversation_that_begins_with_the_model_loses_that_turn(template, tokenizer):
    rounds = turns(CONVERSATIONS["rounds"])
    first = preprocess("qwen_1_5", [[{"from": "gpt", "value": "Hello"}, *rounds]], tokenizer, False)
    assert torch.equal(first["input_ids"][0], preprocess("qwen_1_5", [rounds], tokenizer, False)["input_ids"][0])


def test_a_tokenizer_that_begins_with_bos(template, world):
    """As in evaluation: one BOS at the beginning, with and without an image, and none in between."""
    tokenizer = spare_tokenizer(bos=True)
    rounds = [("a b", "c d"), ("d", "a")]
    for image in (True, False):
        batch = preprocess("qwen_1_5", [turns(rounds, image)], tokenizer, image)
        ids = batch["input_ids"][0].tolist()
        assert ids == tokens_of(tokenizer, prompt_of("qwen_1_5", rounds, image), image)
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert batch["labels"][0][0] == IGNORE_INDEX


def test_a_sample_without_a_label_is_an_error(template, tokenizer):
    with pytest.raises(SampleError, match=r"(?s)no label is left.*template 'qwen_1_5' \(MPT\) with Qwen2Tokenizer"):
        preprocess("qwen_1_5", [[{"from": "human", "value": "What?"}]], tokenizer, False)
    # LLaVA's v1 assumes a tokenizer with BOS; with Qwen's it would train on nothing and say so once a sample.
    with pytest.raises(
        SampleError, match=r"(?s)template 'v1' \(TWO\) with Qwen2Tokenizer.*Qwen needs --version qwen_1_5"
    ):
        preprocess("v1", [turns(CONVERSATIONS["one round"], True)], tokenizer, True)
    with pytest.raises(
        SampleError, match=r"(?s)another tokenizer under the template 'v1' .*Qwen needs --version qwen_1_5"
    ):
        preprocess("v1", [turns(CONVERSATIONS["rounds"], True)], tokenizer, True)
    with pytest.raises(SampleError, match="a turn is from 'system'"):
        preprocess("qwen_1_5", [[{"from": "system", "value": "x"}]], tokenizer, False)


def test_an_unknown_template_is_an_error(template):
    with pytest.raises(ValueError, match="'chatml' is no conversation template .*Known: .*qwen_1_5"):
        use_template("chatml")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------
def spare_tokenizer(bos=False, **special):
    """A word tokenizer, with the special tokens that are asked for and no other."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["a", "b", "c", "d", "<s>", "</s>", "<unk>", "<|im_end|>", "<|im_start|>", "user", "assistant", "system"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    given = {"eos_token": "</s>", "unk_token": "<unk>", **({"bos_token": "<s>"} if bos else {}), **special}
    out = PreTrainedTokenizerFast(tokenizer_object=inner, **given)
    out.add_tokens(["<|im_end|>", "<|im_start|>"], special_tokens=True)
    return out


@pytest.mark.parametrize("version", ["qwen_1_5", "qwen_base", "plain", "v1"])
@pytest.mark.parametrize(
    "eos, pad", [("<|im_end|>", "<|endoftext|>"), ("<|endoftext|>", "<|endoftext|>"), ("<|endoftext|>", None)]
)
def test_padding_is_never_the_end_token(template, world, version, eos, pad):
    """The configurations of Qwen's chat and base models."""
    tokenizer = AutoTokenizer.from_pretrained(str(world["tokenizer"]), use_fast=False, eos_token=eos, pad_token=pad)
    for _ in range(2):  # a prepared tokenizer that was saved is prepared again in the next stage
        prepare_tokenizer(tokenizer, use_template(version))
        assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
        stop = {"qwen_1_5": "<|im_end|>", "qwen_base": "<|endoftext|>"}.get(version, eos)
        assert tokenizer.eos_token == stop
        assert len(tokenizer) <= 1024, "no token is added"
    sample = (
        preprocess(version, [turns(CONVERSATIONS["one round"], True)], tokenizer, True) if version != "v1" else None
    )
    if sample is not None:
        assert tokenizer.pad_token_id not in sample["input_ids"][0]


def test_llamas_padding_is_its_unknown_token(template):
    tokenizer = spare_tokenizer(bos=True)
    prepare_tokenizer(tokenizer, use_template("v1"))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<unk>", "</s>")


def test_a_tokenizer_with_nothing_to_pad_with_is_an_error(template):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    with pytest.raises(ValueError, match="no special token to pad with .* end token '</s>': set pad_token"):
        prepare_tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"), use_template("v1"))


def test_padding_is_no_ordinary_entry_of_the_vocabulary(template):
    """`<unk>` is one in Qwen's, and may stand in a text; under `plain` the end token is not to be had either."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "<pad>": 2, "<|endoftext|>": 3, "<|im_end|>": 4}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = "<|endoftext|>"
    out = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=special, pad_token=special, unk_token=special)
    out.add_tokens(["<|im_end|>"], special_tokens=True)
    prepare_tokenizer(out, use_template("plain"))
    assert (out.eos_token, out.pad_token) == (special, "<|im_end|>")
    assert out.pad_token_id not in out("a <unk> <pad>").input_ids


@pytest.mark.parametrize("name", ["qwen_1_5", "qwen_base", "v1", "mistral_instruct", "llava_llama_2", "plain"])
def test_the_template_in_use_is_known_by_a_name_that_finds_it(template, name):
    used = use_template(name)
    assert conversation.conv_templates[current_template()] is used
    assert current_template() == name or name == "plain"


def test_a_template_with_several_names_is_known_by_its_version(template):
    use_template("qwen_2_5")
    assert current_template() == "qwen_1_5"
