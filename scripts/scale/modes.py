"""The ways to train on several processes, as flags of `llava_compodistill.train`, on the CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import accelerate
from packaging.version import Version

SCRIPTS = Path(__file__).resolve().parents[1]
MODES = ("ddp", "zero2", "zero3", "fsdp2")
#: With a GPU accelerate starts DeepSpeed's communication; on the CPU it starts torch's alone.
_FSDP = """
# accelerate starts FSDP on accelerators alone, and on CPUs trains by DDP without a word.
from accelerate import state
from accelerate.utils import DistributedType

def init(self, *args, original=state.AcceleratorState.__init__, **kwargs):
    original(self, *args, **kwargs)
    if kwargs.get("fsdp_plugin") is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = kwargs["fsdp_plugin"]

state.AcceleratorState.__init__ = init
"""
_DEEPSPEED = "import deepspeed\ndeepspeed.init_distributed('gloo', auto_mpi_discovery=False)\n"


def missing(mode: str) -> str | None:
    """Why this environment cannot run a mode; None where it can."""
    if mode.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    if mode == "fsdp2" and Version(accelerate.__version__) < Version("1.6"):
        return f"accelerate {accelerate.__version__} has no FSDP2 (1.6 has)"
    return None


def flags(mode: str, folder: Path) -> dict[str, Any]:
    """The flags of a mode; None drops one.

    Args:
        folder: for the files that they name.
    """
    gloo = {"ddp_backend": "gloo"}
    if mode == "ddp":
        return gloo
    if mode == "fsdp2":
        path = folder / "fsdp2.json"
        path.write_text(json.dumps({"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}))
        return {**gloo, "fsdp": "full_shard auto_wrap", "fsdp_config": path}
    config = json.loads((SCRIPTS / f"{mode}.json").read_text())
    if mode == "zero3":
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small weights too are partitioned
    config["zero_allow_untested_optimizer"] = True
    path = folder / f"{mode}.json"
    path.write_text(json.dumps(config))
    # Told to use the CPU, accelerate before 1.0 forgets DeepSpeed; newer ones stay with one process unless told.
    modern = Version(accelerate.__version__) >= Version("1.0")
    return {"deepspeed": path, **(gloo if modern else {"use_cpu": None})}


def prelude(mode: str) -> str:
    """What a rank runs before training."""
    if mode == "fsdp2":
        return _FSDP
    return _DEEPSPEED if mode.startswith("zero") else ""
