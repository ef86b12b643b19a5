"""Every way to train on several processes gives the losses and weights of one, goes on from its checkpoints, and saves
what the next stage and LLaVA load. scripts/scale/run.py asks this of every stage; here are the cells that differ most.
"""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

from llava_compodistill import compat
from llava_compodistill.errors import CheckpointError, FlagError
from llava_compodistill.pair import student
from llava_compodistill.train import sharding
from llava_compodistill.train.pickles import refuse_unknown
from scale import modes, world
from scale.matrix import SAME_NUMBERS, TOLERANCE, Matrix, apart, read_log, weights_in

pytestmark = pytest.mark.invariant
LINKS = {link.name: link for link in world.links()}
CELLS = [
    ("fsdp2", "dpt"),
    pytest.param("fsdp2", "dft-lora-after-dpt", marks=pytest.mark.long),
    pytest.param("zero2", "dft-lora-after-dpt", marks=pytest.mark.long),
    # One of its micro-batches has no image.
    pytest.param("zero3", "dft-full-after-dpt", marks=pytest.mark.once),
    pytest.param("zero3", "sft-full-after-dft", marks=pytest.mark.long),
    *(
        pytest.param(mode, run, marks=pytest.mark.long)
        for mode in ("fsdp2", "zero2", "zero3")
        for run in ("pt", "sft-full-after-dft", "sft-lora-after-dft")
        if (mode, run) != ("zero3", "sft-full-after-dft")
    ),
]


@pytest.fixture(scope="module")
def matrix(ranks, tmp_path_factory):
    return Matrix(world.make(tmp_path_factory.mktemp("scale")), ranks)


@pytest.mark.slow
@pytest.mark.parametrize("mode, run", CELLS)
def test_a_cell_holds(matrix, mode, run):
    if modes.missing(mode):
        pytest.skip(modes.missing(mode))
    link = LINKS[run]
    chain = [link]
    while chain[0].after is not None:
        chain.insert(0, LINKS[chain[0].after])
    for each in chain:
        assert matrix.reference(each) is None
    cell = matrix.cell(mode, link, resumed_from=(world.MIDDLE,), before="one")
    assert cell.problem is None, cell.problem
    assert cell.losses <= TOLERANCE["losses"] and cell.weights <= TOLERANCE["weights"], cell
    assert cell.moved <= TOLERANCE["moved"], cell
    assert cell.resumed <= TOLERANCE["resumed"] and cell.resumed_losses <= TOLERANCE["resumed"], cell
    folder = matrix.root / mode / link.name / f"checkpoint-{world.MIDDLE}"
    refuse_unknown(folder, trusted=False)
    assert mode != "fsdp2" or (folder / "optimizer.bin").exists(), "that was DDP"
    assert not list(folder.glob("pytorch_model_fsdp*")), "the weights are there a second time"


@pytest.mark.long
@pytest.mark.parametrize("mode", ["fsdp2", "zero2", "zero3"])
def test_llavas_builder_loads_what_is_saved(matrix, mode):
    """The logits of what two processes have saved, whole and LoRA, are those of one process' model."""
    if modes.missing(mode):
        pytest.skip(modes.missing(mode))
    links = [LINKS[name] for name in ("dpt", "dft-full-after-dpt", "dft-lora-after-dpt")]
    assert not any(matrix.reference(link) for link in links)
    saved = [link for link in links if link.name != "dpt"]
    cells = {link.name: matrix.cell(mode, link, resumed_from=(world.MIDDLE,), before="one") for link in saved}
    matrix.load(mode, saved, cells)
    for cell in cells.values():
        assert cell.problem is None and cell.logits <= TOLERANCE["logits"], cell


@pytest.mark.parametrize("run", ["dpt", "dft-lora-after-dpt"])
@pytest.mark.long
def test_zero3_holds_new_weights_in_the_precision_that_it_computes_in(matrix, ranks, tmp_path, run):
    if modes.missing("zero3"):
        pytest.skip(modes.missing("zero3"))
    for name in dict.fromkeys(("dpt", run)):
        assert matrix.reference(LINKS[name]) is None
    options = {"bf16": True, "gradient_accumulation_steps": 2, "save_strategy": "no", **modes.flags("zero3", tmp_path)}
    flags = matrix.world.flags(LINKS[run], matrix.root / "one", tmp_path / "out", **options)
    done = ranks.train(flags, 2, tmp_path / "log", SAME_NUMBERS + modes.prelude("zero3"))
    assert done.ok, done.text[-3000:]
    exact = read_log(matrix.root / "one" / run)
    assert read_log(tmp_path / "out")[0]["loss"] == pytest.approx(exact[0]["loss"], rel=2e-2)


@pytest.mark.long
def test_machines_without_a_shared_folder_save_and_go_on(matrix, ranks, tmp_path):
    """One of them has lost its newest checkpoint."""

    def run(name):
        options = {**modes.flags("ddp", tmp_path), "save_on_each_node": True, "gradient_accumulation_steps": 2}
        flags = matrix.world.flags(LINKS["dpt"], tmp_path, tmp_path / f"{name}-{{rank}}", **options)
        done = ranks.train(flags, 2, tmp_path / f"{name}.log", machines=True)
        assert done.ok, done.text[-3000:]

    run("first")
    for rank, steps in enumerate(((1, 2, 3), (1, 2))):
        for name in (f"checkpoint-{step}" for step in steps):
            shutil.copytree(tmp_path / f"first-{rank}" / name, tmp_path / f"again-{rank}" / name)
    run("again")
    expected = weights_in(tmp_path / "first-0")
    for folder in ("first-1", "again-0", "again-1"):
        assert apart(weights_in(tmp_path / folder), expected)[0] == 0, folder
        assert read_log(tmp_path / folder) == read_log(tmp_path / "first-0"), folder


# ---------------------------------------------------------------------------------------------------------------------
# What FSDP cannot do here
# ---------------------------------------------------------------------------------------------------------------------
def fsdp(**config):
    return SimpleNamespace(fsdp=True, fsdp_config=config, fsdp_plugin_args={"fsdp_version": config.get("version", 2)})


def test_the_first_fsdp_is_refused(monkeypatch):
    monkeypatch.setattr(compat.accelerate, "__version__", "1.6.0")
    sharding.check_fsdp(SimpleNamespace(fsdp=[]))
    sharding.check_fsdp(fsdp())
    with pytest.raises(FlagError, match=r"--fsdp: this is the first FSDP \(the version in --fsdp_config\).*zero3"):
        sharding.check_fsdp(fsdp(version=1))
    with pytest.raises(FlagError, match="transformers .* starts no other"):
        sharding.check_fsdp(SimpleNamespace(fsdp=["full_shard"], fsdp_config={}))
    monkeypatch.setattr(compat.accelerate, "__version__", "0.30.1")
    with pytest.raises(FlagError, match="accelerate 0.30.1 has no other"):
        sharding.check_fsdp(fsdp())


def test_weights_saved_in_parts_are_refused(monkeypatch):
    monkeypatch.setattr(compat.accelerate, "__version__", "1.6.0")
    with pytest.raises(FlagError, match="state_dict_type SHARDED_STATE_DICT would save the weights in parts"):
        sharding.check_fsdp(fsdp(state_dict_type="SHARDED_STATE_DICT"))


def test_weights_that_nobody_has_split_are_whole():
    weight = torch.ones(3)
    assert sharding.whole(weight) is weight and sharding.own_part(weight) is weight


def test_a_trained_encoder_is_refused_under_fsdp():
    """Its weights would be in no checkpoint."""
    core = SimpleNamespace(config=SimpleNamespace(unfreeze_mm_vision_tower=True))
    with pytest.raises(CheckpointError, match="there has an encoder of its own.*leave --fsdp out"):
        student._hide_tower(core, "there")


def test_a_student_of_nan_is_infinitely_far():
    nan = {"weight": torch.tensor([float("nan"), 1.0])}
    assert apart(nan, {"weight": torch.ones(2)}) == (float("inf"), float("inf"))
