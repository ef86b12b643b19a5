"""What does not change is done once, not in every micro-batch or for every sample; and what comes out is the same."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from factory import make_model

from llava_compodistill.hosts.llava import register, templates

register(train=True)

from llava_compodistill.train.data import CheckedDataset  # noqa: E402
from llava_compodistill.train.overhead import CountsOnce  # noqa: E402


class Counting:
    """A tokenizer, or a list of records, that tells how often it is asked."""

    def __init__(self, inner):
        self.inner, self.asked = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def __call__(self, *args, **kwargs):
        self.asked += 1
        return self.inner(*args, **kwargs)

    def __getitem__(self, index):
        self.asked += 1
        return self.inner[index]


def test_operations_are_counted_as_transformers_does(siglip):
    class Trainer(CountsOnce, transformers.Trainer):
        def __init__(self, model):  # nothing else is needed to count
            self.model = model

    trainer = Trainer(make_model(siglip, dtype=torch.float32))
    calls, count = [], trainer.model.num_parameters
    for shape in ((2, 7), (3, 11), (2, 7)):
        inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
        expected = transformers.Trainer.floating_point_ops(trainer, inputs)
        trainer.model.num_parameters = lambda *args, **kwargs: calls.append(1) or count(*args, **kwargs)
        assert trainer.floating_point_ops(inputs) == expected > 0
        del trainer.model.num_parameters
    assert len(calls) == 1


def test_a_models_device_is_that_of_its_first_weights(siglip, monkeypatch):
    model = make_model(siglip, dtype=torch.float32)
    expected = next(model.parameters()).device
    assert next(model.parameters()) is model.get_model().embed_tokens.weight
    monkeypatch.setattr(torch.nn.Module, "parameters", None)  # no walk
    assert model.device == expected


@pytest.fixture
def tokenizer(world):
    found = transformers.AutoTokenizer.from_pretrained(str(world["tokenizer"]), model_max_length=512)
    with templates.under_template("qwen_1_5") as template:
        templates.prepare_tokenizer(found, template)
        yield found


def test_a_sample_reads_its_record_once(world, tokenizer, tmp_path):
    path = tmp_path / "data.json"
    turns = [{"from": "human", "value": "What color?"}, {"from": "gpt", "value": "Red"}]
    path.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(3)]))
    options = {"image_folder": None, "bad_samples": "error", "check_images": False, "is_multimodal": False}
    options |= {"image_processor": None, "image_aspect_ratio": "pad", "mm_use_im_start_end": False}
    data = CheckedDataset(str(path), tokenizer, SimpleNamespace(**options))
    expected = data[1]
    data.list_data_dict = Counting(data.list_data_dict)
    for name, value in data[1].items():
        assert torch.equal(value, expected[name])
    assert data.list_data_dict.asked == 1


def test_short_texts_are_tokenized_once(tokenizer):
    counting = Counting(tokenizer)
    turns = [{"from": "human", "value": "What color?"}, {"from": "gpt", "value": "Red " * 100}]
    first = templates.preprocess_qwen([turns], counting)
    asked = counting.asked
    again = templates.preprocess_qwen([turns], counting)
    assert counting.asked - asked == 1, "the long answer alone"
    for name in first:
        assert torch.equal(first[name][0], again[name][0])
    texts = ["", "What color?", "<|im_start|>", " \n"]
    assert [list(templates._tokens(tokenizer, text)) for text in texts] == [
        tokenizer(text, add_special_tokens=False).input_ids for text in texts
    ]


def test_tokens_that_are_added_are_read(tokenizer):
    before = list(templates._tokens(tokenizer, "a<new>b"))
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    after = list(templates._tokens(tokenizer, "a<new>b"))
    assert after == tokenizer("a<new>b", add_special_tokens=False).input_ids != before
