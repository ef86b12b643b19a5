"""DFT's LoRA merged into the language model by LLaVA's own recipe, and a new LoRA begun on it (scripts/README.md, "As
the authors' code")."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from llava_compodistill.hosts.llava.host import import_llava
from llava_compodistill.hosts.llava.loader import checkpoint_kind


def test_a_new_lora_starts_from_the_merged_model(dft, dpt_path, world, tmp_path):
    lora = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0, "mm_projector_type": "taf"}
    dft("dft-lora", pretrain_mm_mlp_adapter=dpt_path / "mm_projector.bin", learning_rate=1e-2, **lora)
    # What LLaVA's scripts/merge_lora_weights.py does.
    name = import_llava("llava.mm_utils").get_model_name_from_path(str(tmp_path / "dft-lora"))
    loader = import_llava("llava.model.builder").load_pretrained_model
    base = str(world["qwen-student"])
    tokenizer, model, _, _ = loader(str(tmp_path / "dft-lora"), base, name, device_map="cpu", device="cpu")
    merged = tmp_path / "merged"
    model.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    assert checkpoint_kind(str(merged)) == "full"

    logs = {}
    for source in ("dft-lora", "merged"):
        out = tmp_path / f"sft-{source}"
        tiny.run(world, "sft", out, model_name_or_path=tmp_path / source, **lora)
        logs[source] = tiny.read_log(out)
    assert logs["merged"][0]["lm"] == pytest.approx(logs["dft-lora"][0]["lm"], rel=1e-4), "the same model"
    assert logs["merged"][1]["lm"] != pytest.approx(logs["dft-lora"][1]["lm"], rel=1e-5), "a new LoRA"
    config = json.loads((tmp_path / "sft-merged" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(merged)
    # The result is loaded on the merged model.
    _, model, _, _ = loader(str(tmp_path / "sft-merged"), str(merged), "llava-lora", device="cpu")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
