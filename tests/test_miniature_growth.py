"""The teacher that is grown from a shallow one."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from transformers import set_seed

from llava_compodistill.hosts.llava.model import llava_core
from llava_compodistill.pair.layers import visual_understanding_layers
from llava_compodistill.record.sight import sight_by_layer
from llava_compodistill.train import facts
from miniature import weights
from miniature.evaluate import load_for_evaluation
from miniature.growth import grow


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    if not weights.have_stored_weights():
        pytest.skip("no stored weights")
    models = tmp_path_factory.mktemp("models")
    weights.install(models)
    return models / "llava-teacher"


def logits(model, tokenizer):
    set_seed(0)
    inputs = tokenizer("a red circle left of a blue square", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=inputs, use_cache=False).logits


@pytest.mark.parametrize("below", [1, 9])  # more than the model has layers, too
def test_new_layers_begin_as_identities(teacher, tmp_path, below):
    layers = json.loads((teacher / "config.json").read_text())["num_hidden_layers"]
    model, tokenizer = load_for_evaluation(grow(teacher, tmp_path / "grown", below, layers))
    assert model.config.num_hidden_layers == layers + below
    before = load_for_evaluation(teacher)[0]
    assert torch.equal(logits(model, tokenizer), logits(before, tokenizer))
    # They are no dead weight: all but what writes into the residual stream is random, and other with another seed.
    query = "model.layers.0.self_attn.q_proj.weight"
    other = load_for_evaluation(grow(teacher, tmp_path / "other", below, layers, seed=1))[0]
    assert model.state_dict()[query].std() > 0.05
    assert not torch.equal(model.state_dict()[query], other.state_dict()[query])


def test_layers_above_are_left_out(teacher, tmp_path):
    model, _ = load_for_evaluation(grow(teacher, tmp_path / "grown", 1, 3))
    old = load_for_evaluation(teacher)[0].state_dict()
    new = model.state_dict()
    assert model.config.num_hidden_layers == 4
    for name in (name for name in new if "layers." in name and "layers.0." not in name and "tower" not in name):
        number = int(name.split("layers.")[1].split(".")[0])
        assert torch.equal(new[name], old[name.replace(f"layers.{number}.", f"layers.{number - 1}.")])
    with pytest.raises(ValueError, match="cannot be kept"):
        grow(teacher, tmp_path / "grown", 1, 99)


def test_the_stored_teacher_reads_in_the_paper_s_band(distilled, teacher, tmp_path):
    """What makes the miniature a world in which the paper's choice of layers can be tested."""
    world = {"data": distilled / "data", **{name: distilled / "models" / name for name in weights.FOLDERS}}
    options = {"model_name_or_path": teacher, "version": "qwen_qa", "mm_projector_type": None}
    options |= {"model_max_length": 1024, "learning_rate": 0, "max_steps": 1, "per_device_train_batch_size": 16}
    trainer = tiny.run(world, "sft", tmp_path / "out", **options)
    model = llava_core(trainer.model).eval()
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(2), strict=False)]
    batches = [{name: value for name, value in batch.items() if name != facts.KEY} for batch in batches]
    costs = torch.tensor(sight_by_layer(model, batches)).mean(dim=0).clamp(min=0)
    band = visual_understanding_layers(len(costs))
    assert costs[band].sum() > 0.95 * costs.sum() and costs[band[0]] > 0.5
