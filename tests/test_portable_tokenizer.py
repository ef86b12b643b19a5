"""Tokenizers saved by transformers 5.x are read by the slow classes of 4.37, and the other way round.

Each test runs in both generations. What the other one saves is imitated: `as_saved_by_5` takes from a folder what 5.x
would not have written.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import factory
import pytest
from transformers import AutoTokenizer

from llava_compodistill import compat
from llava_compodistill.train import checkpoint

MODERN = compat.TRANSFORMERS.major >= 5
ADDED = ("<im_start>", "</think>")
TEXTS = (
    "<|im_start|>user\nWhat color is the square?<|im_end|>\n<|im_start|>assistant\nRed<|im_end|>\n",
    "12 circles, it's  left of\n\n the blüe ＳＱＵＡＲＥ; <im_start>e\u0301 </think>",
)

ARGS = SimpleNamespace(method="compodistill", stage="dpt")


def load(folder, **options):
    return AutoTokenizer.from_pretrained(str(folder), use_fast=False, **options)


def read(folder, name="tokenizer_config.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def as_saved_by_5(source, folder):
    """tokenizer.json with merges as pairs, and the short config: no vocabulary files, no added tokens."""
    folder.mkdir()
    state, config = read(source, "tokenizer.json"), read(source)
    state["model"]["merges"] = [merge.split(" ") for merge in state["model"]["merges"]]
    # Added by a user: a special token and one like any word.
    last = state["added_tokens"][-1]
    for place, content in enumerate(ADDED, start=1):
        state["added_tokens"].append({**last, "id": last["id"] + place, "content": content, "special": place == 1})
    del config["added_tokens_decoder"]
    config["extra_special_tokens"] = config.pop("additional_special_tokens")
    config |= {"backend": "tokenizers", "is_local": True, "local_files_only": False}
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def assert_readable_by_4(folder):
    """What the slow Qwen2Tokenizer of transformers 4.37.2 asks of a folder."""
    config = read(folder)
    assert config["tokenizer_class"] == "Qwen2Tokenizer" and "extra_special_tokens" not in config
    vocab = read(folder, "vocab.json")
    assert sorted(vocab.values()) == list(range(len(vocab)))
    first, *merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert first.startswith("#version") and merges
    for merge in merges:
        left, right = merge.split(" ")
        assert left in vocab and right in vocab and left + right in vocab
    added = {int(index): token for index, token in config["added_tokens_decoder"].items()}
    assert sorted(added) == list(range(len(vocab), len(vocab) + len(added)))
    flags = {"content", "lstrip", "normalized", "rstrip", "single_word", "special"}
    assert all(token.keys() == flags for token in added.values())
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= {token["content"] for token in added.values()}
    special = {token["content"] for token in added.values() if token["special"]}
    assert set(config["additional_special_tokens"]) == special - {"<|endoftext|>"}  # which is there to pad
    if (folder / "tokenizer.json").exists():
        model = read(folder, "tokenizer.json")["model"]
        assert model["merges"] == merges and model["vocab"] == vocab
    return added


def assert_same_tokenizer(found, expected):
    assert found.get_vocab() == expected.get_vocab() and len(found) == len(expected)
    for text in TEXTS:
        ids = expected(text).input_ids
        assert found(text).input_ids == ids
        assert found.decode(ids) == expected.decode(ids)
        assert found.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True)
    for name in ("eos_token", "pad_token", "bos_token", "unk_token", "model_max_length", "padding_side"):
        assert getattr(found, name) == getattr(expected, name), name


def test_a_folder_of_5_is_made_readable(world, tmp_path):
    expected = load(world["tokenizer"])
    expected.add_tokens([ADDED[0]], special_tokens=True)
    expected.add_tokens([ADDED[1]])
    folder = as_saved_by_5(world["tokenizer"], tmp_path / "tokenizer")
    if not MODERN:
        with pytest.raises(TypeError):  # what users of LLaVA's generation would see
            load(folder)
    compat.make_tokenizer_portable(folder)
    added = assert_readable_by_4(folder)
    assert added[max(added)] == {
        "content": "</think>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
        "special": False,
    }  # fmt: skip
    assert_same_tokenizer(load(folder), expected)
    assert_same_tokenizer(AutoTokenizer.from_pretrained(str(folder), use_fast=True), expected)


def test_it_can_be_done_twice(world, tmp_path):
    folder = as_saved_by_5(world["tokenizer"], tmp_path / "tokenizer")
    compat.make_tokenizer_portable(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    compat.make_tokenizer_portable(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_a_class_that_4_does_not_know_as_slow_gets_its_name(world, tmp_path, name):
    folder = as_saved_by_5(world["tokenizer"], tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps({**read(folder), "tokenizer_class": name}))
    compat.make_tokenizer_portable(folder)
    assert_readable_by_4(folder)


@pytest.mark.parametrize("change", ["pattern", "normalizer", "model"])
def test_another_kind_of_tokenizer_stays_as_it_is(world, tmp_path, change):
    """The slow Qwen2Tokenizer would split its text otherwise, in silence."""
    folder = as_saved_by_5(world["tokenizer"], tmp_path / "tokenizer")
    state = read(folder, "tokenizer.json")
    if change == "pattern":
        state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}|\p{L}+"
    elif change == "normalizer":
        state["normalizer"] = None
    else:
        state["model"]["type"] = "WordPiece"
    (folder / "tokenizer.json").write_text(json.dumps(state))
    (folder / "tokenizer_config.json").write_text(json.dumps({**read(folder), "tokenizer_class": "Another"}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    compat.make_tokenizer_portable(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.skipif(not MODERN, reason="looks at what transformers 5 saves")
def test_5_saves_what_is_imitated_here(world, tmp_path):
    imitated = as_saved_by_5(world["tokenizer"], tmp_path / "imitated")
    load(world["tokenizer"]).save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {path.name for path in imitated.iterdir()}
    saved, ours = read(tmp_path / "saved"), read(imitated)
    assert saved["extra_special_tokens"] == ours["extra_special_tokens"]
    assert saved.keys() - {"padding_side"} == ours.keys()
    merges = [read(path, "tokenizer.json")["model"]["merges"] for path in (tmp_path / "saved", imitated)]
    assert merges[0] == merges[1]


def test_a_checkpoint_holds_a_tokenizer_for_both_generations(world, siglip, tmp_path):
    tokenizer = load(world["tokenizer"], model_max_length=512, padding_side="right")
    model = factory.make_model(siglip)
    checkpoint.save(model, str(tmp_path / "llava-student"), ARGS, tokenizer)
    assert_readable_by_4(tmp_path / "llava-student")
    assert_same_tokenizer(load(tmp_path / "llava-student"), tokenizer)


@pytest.mark.parametrize("legacy", [True, False])
def test_llamas_tokenizer_keeps_its_sentencepiece_model(siglip, tmp_path, legacy):
    base = factory.make_llama_tokenizer(tmp_path / "base", legacy)
    tokenizer = load(base, padding_side="right")
    tokenizer.add_tokens(["<im_start>"], special_tokens=True)
    text = "USER: a red square ASSISTANT: Red</s>USER: <im_start> a blue one"
    ids = tokenizer(text).input_ids
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        checkpoint.save(factory.make_model(siglip), str(folder), ARGS, tokenizer)
        assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
        config = read(folder)
        assert config["legacy"] == legacy and config["tokenizer_class"] == "LlamaTokenizer"
        added = {token["content"]: int(index) for index, token in config["added_tokens_decoder"].items()}
        assert added == {"<unk>": 0, "<s>": 1, "</s>": 2, "<im_start>": 320} and 320 in ids
        tokenizer = load(folder)  # the next stage starts from this one
        assert tokenizer(text).input_ids == ids
