"""Scores of given answers against a plain forward and against generation; similarity against plain maps."""

from __future__ import annotations

import json

import pytest
import torch

from llava_compodistill.analysis.similarity import all_maps, similarity
from llava_compodistill.eval.scoring import Question, batches, score
from llava_compodistill.losses import attention_similarity
from llava_compodistill.pair.layers import layer_at_equal_depth, match_layers, visual_understanding_layers


@pytest.fixture(scope="module")
def teacher(teacher_path):
    from miniature.evaluate import load_for_evaluation

    return load_for_evaluation(teacher_path)


@pytest.fixture(scope="module")
def questions(world) -> list[Question]:
    lines = (world["data"] / "recognition_val.jsonl").read_text().splitlines()[:7]
    records = [json.loads(line) for line in lines]
    images = world["data"] / "images"
    return [Question(str(images / r["image"]), r["text"], r["answer"]) for r in records]


def test_log_probability_is_that_of_a_plain_forward(teacher, questions):
    model, tokenizer = teacher
    scores = score(questions, model, tokenizer, batch_size=3)
    assert len(scores) == len(questions)
    for question, result in zip(questions, scores, strict=True):
        (inputs,) = batches([question], model, tokenizer, version="qwen_1_5", batch_size=1)
        with torch.inference_mode():
            _, _, _, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
                inputs["input_ids"], None, inputs["attention_mask"], None, inputs["labels"], inputs["images"]
            )
            logits = model(inputs_embeds=embeds).logits[0].double()
        rows = (labels[0, 1:] != -100).nonzero().flatten()
        expected = torch.log_softmax(logits, dim=-1)[rows, labels[0, 1:][rows]].mean()
        assert result.log_probability == pytest.approx(float(expected), abs=1e-4)


def test_greedy_agrees_with_generation(teacher, questions):
    model, tokenizer = teacher
    question = questions[0]
    (inputs,) = batches([question], model, tokenizer, version="qwen_1_5", batch_size=1)
    prompt = inputs["input_ids"][:, : int((inputs["labels"][0] != -100).nonzero()[0])]
    # What the model really says, and a wrong answer: only the first is what greedy decoding gives.
    generated = model.generate(prompt, images=inputs["images"], do_sample=False, max_new_tokens=4)[0]
    text = tokenizer.decode(generated, skip_special_tokens=False)
    stop = "<|im_end|>"  # of the template qwen_1_5
    stopped_answer = text.split(stop)[0] if stop in text else None
    candidates = [Question(question.image, question.prompt, word) for word in ("Red", "Circle", text.split(stop)[0])]
    for candidate, result in zip(candidates, score(candidates, model, tokenizer), strict=True):
        assert result.greedy == (candidate.answer == stopped_answer)


def test_a_model_is_entirely_similar_to_itself(teacher, questions):
    model, tokenizer = teacher
    alike = similarity(model, model, questions, tokenizer, batch_size=4)
    assert alike.band == pytest.approx(1.0, abs=1e-5)  # equal depth: groups of one
    assert alike.by_layer == pytest.approx([1.0] * model.config.num_hidden_layers, abs=1e-5)


def test_similarity_by_layer_is_the_mean_over_samples(teacher, questions, world, dpt_path):
    from llava_compodistill.hosts.llava.loader import load_model

    model, tokenizer = teacher
    student = load_model(str(dpt_path), str(world["qwen-student"])).eval()
    student.get_vision_tower().load_model()
    alike = similarity(student, model, questions, tokenizer, batch_size=3)
    depth = student.config.num_hidden_layers
    bands = [visual_understanding_layers(each.config.num_hidden_layers) for each in (student, model)]
    matched = dict(zip(bands[0], match_layers(*bands), strict=True))
    totals = torch.zeros(depth)
    for question in questions:
        (inputs,) = batches([question], student, tokenizer, version="qwen_1_5", batch_size=1)
        mine, batch = all_maps(student, inputs)
        theirs, _ = all_maps(model, inputs)
        rows = batch.attention_rows("answer")
        for layer in range(depth):
            partners = [layer_at_equal_depth(layer, depth, model.config.num_hidden_layers)]
            partners = matched.get(layer, partners)
            target = sum(theirs[partner] for partner in partners) / len(partners)
            totals[layer] += attention_similarity(mine[layer], target, rows)
    assert alike.by_layer == pytest.approx((totals / len(questions)).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("layer", "depth", "other", "expected"),
    [(0, 4, 8, 1), (3, 4, 8, 7), (0, 24, 40, 0), (23, 24, 40, 39), (2, 5, 5, 2)],
)
def test_layer_at_equal_depth(layer, depth, other, expected):
    assert layer_at_equal_depth(layer, depth, other) == expected


def test_padded_vocabulary_is_never_generated(teacher, questions):
    model, tokenizer = teacher
    assert model.lm_head.out_features > len(tokenizer)  # as Qwen's are
    (inputs,) = batches([questions[0]], model, tokenizer, version="qwen_1_5", batch_size=1)
    with torch.no_grad():  # a head that likes nothing better than a padded row
        weight = model.lm_head.weight.clone()
        model.lm_head.weight[len(tokenizer) :] = 100 * weight[0]
        model.lm_head.weight[-1] = -100 * weight[0]  # whichever sign the hidden state calls for
        said = model.generate(inputs["input_ids"], images=inputs["images"], do_sample=False, max_new_tokens=8)
        model.lm_head.weight.copy_(weight)
    assert int(said.max()) < len(tokenizer)
