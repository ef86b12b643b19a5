"""--compile_layers: compiled layers compute what eager ones do, taps too, and what cannot be compiled is named."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from checks import PLAIN, assert_same_log
from factory import make_batch, make_model
from test_placement import ZERO2, ZERO3, training
from test_record import LAYOUTS, arguments, make_objective, state

from llava_compodistill import compat
from llava_compodistill.errors import FlagError
from llava_compodistill.record import compiled
from llava_compodistill.record.compiled import compiled_layers, refuse_without_compiler
from llava_compodistill.record.forward import Needs, record
from llava_compodistill.train import compiling

CAN = pytest.mark.skipif(compat.UNCOMPILED is not None, reason=f"compiling needs {compat.UNCOMPILED}")
LONGER = ["qIqqIqaaqaqqqa", "Iqaqa", "qqqaa"]
LONGEST = ["IqaqaqaqaqaqaqaqaqaqaIq", "Iqaqa", "qqqaa"]


@pytest.fixture
def fresh():
    """Nothing that another test has compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.fixture
def models(siglip):
    """Three layers and four, of which the last two and three are tapped."""
    teacher = make_model(siglip, hidden=48, layers=4, heads=6, vocab=128, seed=1, dtype=torch.float32)
    return make_model(siglip, layers=3, seed=2, dtype=torch.float32).train(), teacher.requires_grad_(False)


def objective_of(models, folder):
    return make_objective(*models, arguments(folder, student_layers="1,2", teacher_layers="1,2,3"))


def losses(objective, layouts, seed):
    """A micro-batch's losses, and gradients of the student."""
    student = objective.pair.student
    student.zero_grad()
    with objective.running():
        batch = make_batch(layouts, dtype=torch.float32, seed=seed)
        sums = objective(student, {**batch.inputs, "use_cache": False})
        total = sum(part.loss for part in sums.values())
        total.backward()
    return [total.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)]


def maps(model, layouts):
    needs = Needs(groups=frozenset({(0, 1), (2,)}), hidden=frozenset({(0, "answer"), (2, "text")}))
    with torch.no_grad(), record(model, needs) as recorder:
        model(**make_batch(layouts, dtype=torch.float32).inputs, use_cache=False)
    found = recorder.latest
    return [*found.maps.values(), *(found.hidden[key] for key in sorted(found.hidden))]


def assert_close(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@CAN
def test_compiled_layers_compute_what_eager_ones_do(models, fresh, monkeypatch, tmp_path):
    """Losses and gradients, through tapped and untapped layers, with a graph and without, in any length; and the code
    for all lengths is soon there."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    student, teacher = models
    objective = objective_of(models, tmp_path)
    batches = [(LAYOUTS, 0), (LONGER, 1), (LAYOUTS, 2), (LONGEST, 3)]
    expected = [losses(objective, *batch) for batch in batches]
    expected_maps = [maps(student, LAYOUTS), maps(teacher, LAYOUTS)]
    before = state(student), state(teacher)
    with compiled_layers(student), compiled_layers(teacher):
        assert all("forward" in vars(layer) for layer in student.get_model().layers)
        frames = []
        for batch, eager in zip(batches, expected, strict=True):
            assert_close(losses(objective, *batch), eager)
            frames.append(fresh["frames"]["ok"])
        for model, eager in zip((student, teacher), expected_maps, strict=True):
            assert_close(maps(model, LAYOUTS), eager)
    assert 0 < frames[0] < frames[2] == frames[3] < 64, frames
    assert fresh["frames"]["ok"] == fresh["frames"]["total"], "a limit was reached, and a layer left eager"
    assert (state(student), state(teacher)) == before
    assert not any("forward" in vars(layer) for layer in student.get_model().layers), "and it is gone"
    assert_close(losses(objective, *batches[0]), expected[0])


@CAN
@pytest.mark.long
def test_under_gradient_checkpointing(models, fresh, monkeypatch, tmp_path):
    """The code that runs in the backward pass keeps what the forward pass kept, tapped or not. (The backend `eager`
    keeps the same tensors with any code.)"""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    student, _ = models
    objective = objective_of(models, tmp_path)
    batches = [(LAYOUTS, 0), (LONGER, 1), (LAYOUTS, 2)]
    expected = [losses(objective, *batch) for batch in batches]
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with compiled_layers(student):
        for batch, eager in zip(batches, expected, strict=True):
            assert_close(losses(objective, *batch), eager)
    assert fresh["frames"]["ok"] == fresh["frames"]["total"] > 0


@CAN
def test_every_layer_runs_the_same_code(siglip, fresh, monkeypatch):
    """Three times the layers are no more graphs."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    counts = []
    for layers in (2, 6):
        torch._dynamo.reset()
        fresh.clear()
        model = make_model(siglip, layers=layers, dtype=torch.float32)
        with compiled_layers(model), torch.no_grad():
            model(**make_batch(LAYOUTS, dtype=torch.float32).inputs, use_cache=False)
        counts.append(fresh["stats"]["unique_graphs"])
    assert counts[0] == counts[1] == 1


@CAN
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.long
def test_torchs_own_compiler(models, fresh, tmp_path):
    student, _ = models
    objective = objective_of(models, tmp_path)
    expected = losses(objective, LAYOUTS, 0)
    refuse_without_compiler("--compile_layers student", torch.device("cpu"))  # there is one
    with compiled_layers(student):
        assert_close(losses(objective, LAYOUTS, 0), expected)
    assert fresh["frames"]["ok"] == fresh["frames"]["total"] > 0


@CAN
def test_without_a_compiler(fresh, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found\nin a long text")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    with pytest.raises(
        FlagError, match=r"(?s)--compile_layers both: PyTorch .* cannot compile here .*No working C\+\+"
    ):
        refuse_without_compiler("--compile_layers both", torch.device("cpu"))
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    refuse_without_compiler("--compile_layers both", torch.device("cpu"))


@CAN
@pytest.mark.long
def test_a_run(dft, fresh, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    caplog.set_level("INFO", logger="llava_compodistill")
    options = {**PLAIN, "max_steps": 2, "mm_projector_type": "taf"}
    _, expected = dft("eager", **options)
    trainer, found = dft("compiled", compile_layers="both", **options)
    assert "Compiled decoder layers: 4 of the student and 6 of the teacher." in caplog.messages
    assert fresh["stats"]["unique_graphs"] > 0
    assert_same_log(found, expected, 1e-4)
    for model in (trainer.model, trainer.objective.teacher):
        assert not any("forward" in vars(layer) for layer in model.get_model().layers)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------
def run_with(**changes):
    values = {"compile_layers": "both", "torch_compile": False, "image_layers": "all", "on_policy": 0.0, "bits": 16}
    values["padding_free"] = False
    return training(**{**values, "gradient_checkpointing": False, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"torch_compile": True, "compile_layers": "none"}, "--torch_compile True .* Use --compile_layers student"),
        (
            {"distilled": False, "stage": "sft"},
            "no teacher is in the loss of --stage sft of compodistill: use student",
        ),
        ({"teacher_placement": "offload"}, "--teacher_placement offload moves the teacher's layers: use replicate"),
        ({"teacher_placement": "4bit"}, "--teacher_placement 4bit moves"),
        ({"bits": 4}, "not with the quantised weights of --bits 4"),
        ({"deepspeed": "zero3.json", "hf_deepspeed_config": ZERO3}, "ZeRO-3 gathers the weights .*: use ZeRO-2"),
        ({"fsdp": "full_shard"}, "not tried with --fsdp: use DDP or ZeRO-2, or teacher"),
        ({"image_layers": "1,2"}, "--image_layers 1,2 gives layers other masks"),
        ({"padding_free": True}, "--padding_free and --pack_length give layers other sizes"),
        ({"on_policy": 0.5}, "with --on_policy 0.5 the student generates"),
        ({"use_liger_kernel": True}, "--use_liger_kernel True has kernels of its own"),
    ],
)
def test_what_cannot_be_compiled(monkeypatch, changes, message):
    monkeypatch.setattr(compat, "UNCOMPILED", None)
    with pytest.raises(ValueError, match=message):
        compiling.check_compiled(run_with(**changes), here=False)


def test_what_can(monkeypatch):
    monkeypatch.setattr(compat, "UNCOMPILED", None)
    zero3 = {"deepspeed": "zero3.json", "hf_deepspeed_config": ZERO3}
    for changes in (
        {},
        {"compile_layers": "teacher", **zero3, "bits": 4, "image_layers": "1", "on_policy": 0.5, "fsdp": "full_shard"},
        {"gradient_checkpointing": True},
        {"compile_layers": "student", "distilled": False, "stage": "sft"},
        {"compile_layers": "student", "teacher_placement": "offload"},
        {"deepspeed": "zero2.json", "hf_deepspeed_config": ZERO2},
        {"compile_layers": "none", "bits": 4},
    ):
        compiling.check_compiled(run_with(**changes), here=False)
    monkeypatch.setattr(compat, "UNCOMPILED", "transformers 4.48 or newer, and this is 4.37.2")
    with pytest.raises(
        ValueError, match="--compile_layers both: needs transformers 4.48 or newer, and this is 4.37.2"
    ):
        compiling.check_compiled(run_with(), here=False)


def test_the_command_line_refuses_before_anything_is_read(world, tmp_path):
    with pytest.raises(FlagError, match="--torch_compile True .*: compiles the whole model"):
        tiny.run(world, "sft", tmp_path / "out", model_name_or_path="not/read", torch_compile=True)
    with pytest.raises(FlagError, match="--compile_layers"):
        tiny.run(world, "sft", tmp_path / "out", model_name_or_path="not/read", compile_layers="teacher")


@CAN
def test_a_teacher_that_auto_has_placed_elsewhere(models, caplog):
    args = SimpleNamespace(compile_layers="both")
    objective = SimpleNamespace(teacher=models[1], terms=[])
    trainer = SimpleNamespace(args=args, model=models[0], objective=objective, _placed=("offload", None))
    caplog.set_level("INFO", logger="llava_compodistill")
    with compiling.compiled(trainer):
        assert all("forward" in vars(layer) for layer in models[0].get_model().layers)
        assert not any("forward" in vars(layer) for layer in models[1].get_model().layers)
    assert caplog.messages == [
        "--compile_layers both: not the teacher's, whose placement is offload.",
        "Compiled decoder layers: 3 of the student.",
    ]


@CAN
def test_a_teacher_that_gradients_pass_through(models):
    term = SimpleNamespace(switched_needs=lambda: Needs())
    objective = SimpleNamespace(teacher=models[1], terms=[term])
    args = SimpleNamespace(compile_layers="teacher", method="switch_kd")
    trainer = SimpleNamespace(args=args, model=models[0], objective=objective, _placed=("replicate", None))
    with pytest.raises(FlagError, match="--compile_layers teacher: gradients of --method switch_kd pass through"):
        with compiling.compiled(trainer):
            pass
