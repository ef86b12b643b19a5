"""--use_liger_kernel: which kernels are put where, and who may not have them. The wiring is tested on a stand-in; the
kernels run in Triton's interpreter where liger-kernel is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from checks import PLAIN, assert_same_log
from factory import make_model

from llava_compodistill.errors import FlagError
from llava_compodistill.pair.student import add_lora
from llava_compodistill.train import checks, compiling
from llava_compodistill.train.arguments import TrainingArguments

HAS = "use_liger_kernel" in TrainingArguments.__dataclass_fields__
CAN = pytest.mark.skipif(not HAS, reason="transformers has the flag since 4.45")


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for liger_kernel.transformers that notes its calls."""
    calls = []

    def apply(family):
        return lambda **options: calls.append((family, options))

    module = ModuleType("liger_kernel.transformers")
    for family in ("qwen2", "llama"):
        setattr(module, f"apply_liger_kernel_to_{family}", apply(family))
    module._apply_liger_kernel_to_instance = lambda **options: None  # what transformers calls: see use_liger
    package = ModuleType("liger_kernel")
    package.transformers = module
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    return calls


def flags(**changes):
    method = SimpleNamespace(changes_student=lambda stage: stage == "d2s")
    values = {"use_liger_kernel": True, "liger_kernel_config": None, "device": torch.device("cuda"), "stage": "dft"}
    return SimpleNamespace(**{**values, "method": "llava_mod", "chosen_method": method, **changes})


ALL = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


def test_which_kernels_are_put_where(liger, siglip, caplog):
    caplog.set_level("INFO", logger="llava_compodistill")
    student, teacher = (make_model(siglip, family) for family in ("qwen2", "llama"))
    compiling.use_liger(student, teacher, flags())
    assert [family for family, _ in liger] == ["qwen2", "llama"]
    assert [options.pop("model") for _, options in liger] == [student, teacher]
    assert [options for _, options in liger] == [ALL, ALL], "never its own forward of the model"
    assert caplog.messages == ["Liger's kernels: rope, rms_norm, swiglu."]
    liger.clear()
    lora = SimpleNamespace(lora_r=2, lora_alpha=2, lora_dropout=0.0, lora_bias="none")
    compiling.use_liger(add_lora(student, lora), None, flags(liger_kernel_config={"swiglu": False}))
    ((family, options),) = liger
    assert options == {**ALL, "swiglu": False, "model": student}, "the model inside PEFT's"


def test_nothing_happens_without_the_flag(liger, siglip):
    compiling.use_liger(make_model(siglip), None, flags(use_liger_kernel=False))
    compiling.use_liger(make_model(siglip), None, SimpleNamespace())  # a transformers without the flag
    assert not liger


def test_a_family_without_kernels_is_named(liger, siglip):
    with pytest.raises(FlagError, match="no kernels for llava_mistral"):
        compiling.use_liger(make_model(siglip, "mistral"), None, flags())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"liger_kernel_config": {"fused_linear_cross_entropy": True}}, "fused_linear_cross_entropy is none of rope"),
        ({"liger_kernel_config": {"geglu": True}}, "geglu is none of rope, rms_norm, swiglu"),
        ({"stage": "d2s"}, "--stage d2s of llava_mod makes experts"),
        ({"device": torch.device("cpu")}, "its kernels need a GPU, or leave the flag out"),
        ({}, r"needs liger-kernel \(.*\): pip install liger-kernel, or leave the flag out"),
    ],
)
def test_who_may_not_have_them(monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match=message):
        compiling.check_liger(flags(**changes))


def test_who_may(liger):
    compiling.check_liger(flags(liger_kernel_config={"rope": False, "cross_entropy": False}))
    compiling.check_liger(flags(device=torch.device("cpu")), here=False)
    compiling.check_liger(flags(use_liger_kernel=False, stage="d2s"))


@CAN
def test_the_command_line_refuses_before_anything_is_read(world, tmp_path):
    with pytest.raises(FlagError, match="--use_liger_kernel True: its kernels need a GPU"):
        tiny.run(world, "sft", tmp_path / "out", model_name_or_path="not/read", use_liger_kernel=True)


@CAN
def test_a_run(liger, dft, monkeypatch, mixed, tmp_path):
    """The trainer asks for the kernels once, for both models, and transformers' own way stays without effect."""
    import transformers.integrations.liger as integration

    monkeypatch.setattr(integration, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(checks, "check_liger", lambda *args: None)  # it needs a GPU
    options = {**PLAIN, "max_steps": 1}
    _, expected = dft("plain", **options)
    trainer, found = dft("liger", use_liger_kernel=True, **options)
    assert_same_log(found, expected, 0)
    assert [options["model"] for _, options in liger] == [trainer.model, trainer.objective.teacher]
    # transformers tells a model that Liger has given another forward to leave its logits out.
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_loss"] > 0


#: The kernels in Triton's interpreter, which has to be asked for before Triton is imported.
INTERPRETED = """
import importlib
import sys
import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter
from factory import make_batch, make_model
from test_record import LAYOUTS, arguments, make_objective
from llava_compodistill.train import compiling
from liger_kernel.transformers import monkey_patch

convert = interpreter._implicit_cvt

def with_floats(arg):  # the interpreter leaves a number as Python's, where a compiled kernel has a float32
    if isinstance(arg, float):
        return tl.tensor(interpreter.TensorHandle(numpy.array([arg], numpy.float32), tl.float32), tl.float32)
    return convert(arg)

interpreter._implicit_cvt = with_floats
# A function of CUDA's library, whose body is empty here.
importlib.import_module("liger_kernel.ops.rms_norm").rsqrt = lambda x: 1 / tl.sqrt(x)
tower, folder, family = sys.argv[1:]
kv = {"kv_heads": 2}
teacher = make_model(tower, family, hidden=48, layers=6, heads=6, vocab=128, seed=1, dtype=torch.float32, **kv)
student = make_model(tower, family, seed=2, dtype=torch.float32).train()
args = arguments(folder)
objective = make_objective(student, teacher.requires_grad_(False), args)

def losses():
    student.zero_grad()
    with objective.running():
        sums = objective(student, {**make_batch(LAYOUTS[1:], dtype=torch.float32).inputs, "use_cache": False})
        total = sum(part.loss for part in sums.values())
        total.backward()
    return [total.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)]

expected = losses()
assert not any(kind.startswith("llava_") for kind in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN)
args.use_liger_kernel = True
forward = student.forward
compiling.use_liger(student, teacher, args)
assert student.forward == forward, "the model's own forward stays"
for model in (student, teacher):
    layer = model.get_model().layers[0]
    changed = (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm, model.get_model().norm)
    assert all("forward" in vars(module) for module in changed)
found = losses()
assert len(found) == len(expected) > 20
for mine, theirs in zip(found, expected, strict=True):
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)
"""


@CAN
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_kernels_compute_the_same(siglip, tmp_path, family):
    command = [sys.executable, "-c", INTERPRETED, str(siglip), str(tmp_path), family]
    environment = tiny.environment(TRITON_INTERPRET="1")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=os.getcwd(), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
