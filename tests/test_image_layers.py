"""`--image_layers`: a model that is trained with the image in sight of some layers alone."""

from __future__ import annotations

import factory
import pytest
import reference
import tiny
import torch

from llava_compodistill.hosts.llava import register
from llava_compodistill.hosts.llava.model import llava_core
from llava_compodistill.methods.answers import AnswerTerm
from llava_compodistill.record.costs import answer_costs
from llava_compodistill.record.sight import blind_in
from llava_compodistill.train import run as train_run
from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.objective import Objective

OPTIONS = {"mm_projector_type": "mlp2x_gelu", "learning_rate": 0, "max_steps": 1, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    register()
    return factory.save_tower(tmp_path_factory.mktemp("tower"))


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


LAYOUTS = ["qIqqaaq", "Iqa", "qqaqa", "qIqIqaqaa", "qqIqqq"]  # several images, text alone, no answer


@pytest.mark.parametrize("layers", [[0], [1, 2], [0, 3]], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_loss_and_gradients_are_those_of_the_formulas(tower, family, attention, layers):
    """Against an fp64 computation of single samples, with grouped heads."""
    model = factory.make_model(tower, family, attention=attention, dtype=torch.float32)
    batch = factory.make_batch(LAYOUTS, dtype=torch.float32)
    objective = Objective(model, None, [AnswerTerm()], image_layers=layers)
    with objective.running():
        loss = objective(model, batch.inputs)["answers"].loss
        loss.backward()
    features = factory.encoder_features(model, batch.inputs["images"]).double()
    found = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    weights = {name: weight.detach().double().requires_grad_() for name, weight in found.items()}
    blind = [layer for layer in range(4) if layer not in layers]
    expected = torch.zeros((), dtype=torch.float64)
    for ids, labels, image in batch.samples:
        merged = reference.merge(ids, labels, image, factory.PATCHES)
        hidden, _ = reference.run(weights, model.config, merged, features, blind)
        for position in merged.answers:
            logits = weights["lm_head.weight"] @ hidden[position]
            expected = expected + torch.logsumexp(logits, 0) - logits[merged.labels[position + 1]]
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for name, weight in found.items():
        theirs = weights[name].grad
        assert (weight.grad.double() - theirs).norm() < 2e-4 * theirs.norm() + 1e-7, name
    assert weights["model.mm_projector.0.weight"].grad.norm() > 1e-3


def test_in_bf16(tower):
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = factory.make_model(tower, dtype=dtype)
        objective = Objective(model, None, [AnswerTerm()], image_layers=[2])
        with objective.running():
            losses[dtype] = float(objective(model, factory.make_batch(LAYOUTS, dtype=dtype).inputs)["answers"].loss)
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.03)


def test_what_cannot_be_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="--image_layers intermediate: not in --stage dft"):
        TrainingArguments(output_dir=str(tmp_path), stage="dft", image_layers="intermediate")
    with pytest.raises(ValueError, match="--image_layers 'middle'"):
        TrainingArguments(output_dir=str(tmp_path), stage="sft", image_layers="middle")


def test_layers_that_the_model_lacks_are_refused_before_weights_are_read(world, tmp_path, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr(train_run, "build_student", read)
    with pytest.raises(ValueError, match=r"--image_layers 1,99: layers \[1, 99\] are outside a model with 4 layers"):
        run(world, tmp_path / "out", image_layers="1,99")
