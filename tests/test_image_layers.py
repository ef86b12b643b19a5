"""`--image_layers`: a model that is trained with the image in sight of some layers alone."""

from __future__ import annotations

import pytest
import tiny
import torch

from llava_compodistill.hosts.llava.model import llava_core
from llava_compodistill.record.costs import answer_costs
from llava_compodistill.record.sight import blind_in
from llava_compodistill.train.arguments import TrainingArguments

OPTIONS = {"mm_projector_type": "mlp2x_gelu", "learning_rate": 0, "max_steps": 1, "per_device_train_batch_size": 4}


def run(world, folder, **options):
    return tiny.run(world, "sft", folder, **{**OPTIONS, **options})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_that_of_a_model_blind_in_the_other_layers(world, tmp_path, attention, checkpointing):
    options = {"attn_implementation": attention, "gradient_checkpointing": checkpointing}
    trainer = run(world, tmp_path / "out", image_layers="1", **options)
    loss = tiny.read_log(tmp_path / "out")[0]["lm"]
    model = llava_core(trainer.model)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch = {name: value for name, value in batch.items() if isinstance(value, (torch.Tensor, list))}
    others = [layer for layer in range(model.config.num_hidden_layers) if layer != 1]
    found = {}
    for name, layers in {"blind": others, "whole": []}.items():
        costs, _ = answer_costs(model.eval(), batch, inside=blind_in(model, layers))
        found[name] = float(costs[:, 0].sum() / costs[:, 1].sum())
    assert loss == pytest.approx(found["blind"], rel=1e-4)
    assert abs(found["whole"] - found["blind"]) > 1e-3 * found["blind"]


def test_gradients_reach_the_adapter_through_the_seeing_layers_alone(world, tmp_path):
    trained = {}
    for layers in ("all", "0"):
        trainer = run(world, tmp_path / layers, image_layers=layers, learning_rate=1e-2)
        trained[layers] = llava_core(trainer.model).state_dict()
    name = "model.mm_projector.0.weight"
    assert not torch.equal(trained["all"][name], trained["0"][name])


def test_what_cannot_be_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="--image_layers intermediate: not in --stage dft"):
        TrainingArguments(output_dir=str(tmp_path), stage="dft", image_layers="intermediate")
    with pytest.raises(ValueError, match="--image_layers 'middle'"):
        TrainingArguments(output_dir=str(tmp_path), stage="sft", image_layers="middle")
    with pytest.raises(ValueError, match="--image_layers"):
        run(world, tmp_path / "out", image_layers="1,99")
