"""`llava-compodistill plan`: its counts against models, autograd and PyTorch's FLOP counter; its lines against the
scripts; its errors."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from llava_compodistill.cli import main
from llava_compodistill.hosts.llava.taf import TAFProjector
from llava_compodistill.methods import find_method
from llava_compodistill.ops.answer_loss import answer_loss
from llava_compodistill.ops.answer_loss import head as answer_head
from llava_compodistill.ops.visual_attention import chunked, fused
from llava_compodistill.train.plan import configs, flops, memory, planner
from miniature import weights

SCRIPTS = Path(os.environ.get("COMPODISTILL_SOURCE", Path(__file__).resolve().parents[1])) / "scripts"
CURRENT = int(transformers.__version__.split(".")[0]) >= 5
QWEN3 = hasattr(transformers, "Qwen3Config")
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 160,
    "vocab_size": 128,
}
PAIR = ["--student", "Qwen/Qwen1.5-1.8B", "--teacher", "Qwen/Qwen1.5-4B"]


def config_of(family: str, **changes):
    kind = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}[family]
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})


def build(config, **options):
    return transformers.AutoModelForCausalLM.from_config(config, **options)


def read(config, folder: Path) -> configs.LanguageModel:
    """As the planner reads what transformers writes."""
    config.save_pretrained(folder)
    return configs.read_language_model(str(folder), "--student").model


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"num_key_value_heads": 2}),
        pytest.param(
            "llama",
            {"head_dim": 32, "mlp_bias": True},
            marks=pytest.mark.skipif(not CURRENT, reason="4.37's Llama has neither field"),
        ),
        pytest.param(
            "qwen3",
            {"head_dim": 32, "num_key_value_heads": 2, "attention_bias": True},
            marks=pytest.mark.skipif(not QWEN3, reason="Qwen3 needs transformers 4.51"),
        ),
    ],
)
def test_a_language_models_weights(family, changes, tmp_path):
    config = config_of(family, **changes)
    with torch.device("meta"):
        model = build(config)
    assert read(config, tmp_path).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_llava_checkpoint_is_read_as_its_language_model(tmp_path):
    config = {**config_of("qwen2").to_dict(), "model_type": "llava_qwen2", "mm_vision_tower": "some/tower"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "mm_projector_type": "mlp2x_gelu"}))
    for name in (tmp_path, tmp_path / "config.json"):
        found = configs.read_language_model(str(name), "--teacher")
        assert (found.model.family, found.tower, found.projector) == ("qwen2", "some/tower", "mlp2x_gelu")


#: What the hub shows for these repositories.
PUBLISHED = {
    "Qwen/Qwen1.5-0.5B": 463_987_712,
    "Qwen/Qwen1.5-1.8B": 1_836_828_672,
    "Qwen/Qwen1.5-4B": 3_950_369_280,
    "Qwen/Qwen1.5-7B": 7_721_324_544,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
}


def test_known_models_have_their_published_sizes():
    assert {name: configs.LANGUAGE_MODELS[name].parameters for name in PUBLISHED} == PUBLISHED
    assert configs.read_language_model("qwen2.5-3b", "--student").model.name == "Qwen/Qwen2.5-3B"


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_an_encoders_weights(family, tmp_path):
    prefix = {"siglip": "Siglip", "clip": "CLIP"}[family]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = getattr(transformers, f"{prefix}VisionConfig")(**sizes, image_size=56, patch_size=14)
    with torch.device("meta"):
        model = getattr(transformers, f"{prefix}VisionModel")(config)
    for module in model.modules():
        if isinstance(getattr(module, "head", None), nn.Module):
            module.head = nn.Identity()  # as our tower does
    config.save_pretrained(tmp_path)
    tower = configs.read_tower(str(tmp_path), "--tower")
    assert tower.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (tower.patches, tower.positions) == (16, 17 if family == "clip" else 16)
    # The config of a whole model, which leaves out what is the class's default.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "vision_config": {"image_size": 384}}))
    found = configs.read_tower(str(tmp_path), "--tower")
    default = getattr(transformers, f"{prefix}VisionConfig")()
    assert (found.hidden, found.layers, found.intermediate) == (
        default.hidden_size,
        default.num_hidden_layers,
        default.intermediate_size,
    )
    assert (found.pixels, found.patch) == (384, default.patch_size)


def test_an_adapters_weights():
    models = pair_of(configs.LANGUAGE_MODELS["Qwen/Qwen1.5-0.5B"], configs.LANGUAGE_MODELS["Qwen/Qwen1.5-1.8B"])
    with torch.device("meta"):
        theirs = nn.Sequential(nn.Linear(1152, 2048), nn.GELU(), nn.Linear(2048, 2048))
        adapter = TAFProjector(theirs, 2048, 1024)
    assert models.fetched == sum(parameter.numel() for parameter in theirs.parameters())
    assert models.trained_adapter.parameters == sum(p.numel() for p in adapter.student_map.parameters())


def pair_of(student: configs.LanguageModel, teacher: configs.LanguageModel) -> memory.Models:
    tower = configs.TOWERS[configs.DEFAULT_TOWER]
    return memory.Models(student, tower, teacher, configs.Adapter(tower.hidden, teacher.hidden, 2))


@pytest.fixture
def suite(monkeypatch):
    """The benchmark's suite, as scripts/benchmark/run.py imports it."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS / "benchmark"), *sys.path])
    before = set(sys.modules)
    import plan
    import presets

    yield plan, presets.MINIATURE
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == SCRIPTS / "benchmark":
            del sys.modules[name]


# ---------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------
def saved(layer: nn.Module, hidden: torch.Tensor, positions: tuple, autocast: bool) -> int:
    """Bytes that autograd keeps of a layer beside its weights and the rotary tables: each storage once."""
    known = {t.untyped_storage()._cdata for t in (*layer.parameters(), *positions)}
    sizes, kept = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            sizes[storage._cdata] = storage.nbytes()
        kept.append(tensor)  # or a storage's address would be given again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            layer(hidden, position_embeddings=positions)
    return sum(sizes.values())


@pytest.mark.skipif(not CURRENT, reason="formulas for current transformers")
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("trains", ["all", "LoRA", "nothing"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_what_autograd_keeps_of_a_layer(family, trains, mode, tmp_path):
    config = config_of(family, num_key_value_heads=2, head_dim=16)
    config._attn_implementation = "sdpa"
    lora = trains == "LoRA"
    held = torch.bfloat16 if mode == "bf16" or (mode == "autocast" and lora) else torch.float32
    model = build(config).to(held).requires_grad_(trains == "all")
    sizes = read(config, tmp_path)
    rotary, layer = model.model.rotary_emb, model.model.layers[0]
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
        options = {"r": 8, "lora_dropout": 0.05, "target_modules": targets}
        model = get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=mode == "autocast")
    model.train()
    hidden = torch.randn(2, 24, 64, dtype=held, requires_grad=True)
    positions = rotary(hidden.detach(), torch.arange(24)[None])
    setup = memory.Setup(
        trains_llm=trains != "nothing",
        distils=False,
        aligns=False,
        lora_rank=8 if lora else 0,
        dtype="fp32" if mode == "fp32" else "bf16",
        zero=2 if mode == "bf16" else 0,
        batch=2,
        length=24,
        device="cpu",
    )
    assert memory.saved_by_layer(sizes, setup) == saved(layer, hidden, positions, mode == "autocast")


def test_the_ops_constants():
    assert memory.MAP_CHUNK == {"cuda": chunked.DEFAULT_CHUNK_ELEMENTS, **chunked.CHUNK_ELEMENTS}
    assert memory.HEAD_CHUNK == {"cuda": answer_head.DEFAULT_CHUNK_ELEMENTS, **answer_head.CHUNK_ELEMENTS}
    assert memory.TRITON_HEAD_SIZES == fused.HEAD_SIZES
    weight = torch.empty(151_936, 8)
    assert memory.chunk_rows(151_936, 10_000, "cpu") == answer_head.rows_per_chunk(weight)
    settings = json.loads((SCRIPTS / "zero3.json").read_text())["zero_optimization"]
    assert settings["stage3_max_live_parameters"] == memory.ZERO3_LIVE


# ---------------------------------------------------------------------------------------------------------------------
# A step as it runs
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stage", "lora", "checkpointing"), [("dpt", 0, True), ("dft", 0, False), ("dft", 8, False), ("sft", 0, True)]
)
def test_a_tiny_run(suite, stage, lora, checkpointing, tmp_path):
    """Weights, gradients and optimizer states are exact but for Adam's step counts and buffers of positions."""
    plan, preset = suite
    case = plan.Case(stage, 32, lora=lora, checkpointing=checkpointing)
    setup = case.setup(preset.pair, 64, "cpu")
    peak, before, _ = plan.predicted(preset.pair, setup)
    found = plan.measure(preset.pair, case, torch.device("cpu"), str(tmp_path), 64)
    trained = memory.trained_parameters(preset.pair.models, setup)
    assert found["trained"] == trained
    assert found["gradients"] == 4 * trained == memory.gradients(preset.pair.models, setup)
    assert found["optimizer"] == 8 * trained == memory.resident(preset.pair.models, setup)["optimizer states"]
    assert found["weights"] == before - 12 * trained
    assert peak == pytest.approx(found["peak"], rel=0.15)


def test_zero_and_lora_share_what_they_share():
    models = pair_of(configs.LANGUAGE_MODELS["Qwen/Qwen1.5-1.8B"], configs.LANGUAGE_MODELS["Qwen/Qwen1.5-4B"])
    setup = memory.Setup(trains_llm=True, distils=True, aligns=True, gpus=8)
    trained = memory.trained_parameters(models, setup)
    assert trained == 1_836_828_672 + 2560 * 2048 + 2048
    found = memory.resident(models, setup)
    assert found["optimizer states"] == 12 * trained / 8 and found["student: language model"] == 2 * 1_836_828_672
    assert memory.gradients(models, setup) == 2 * trained / 8
    alone = replace(setup, zero=0, gpus=1)
    assert (
        memory.resident(models, alone)["optimizer states"] == 8 * trained
        and memory.gradients(models, alone) == 4 * trained
    )
    assert memory.gradients(models, replace(alone, gpus=8)) == 8 * trained, "DDP's buckets"
    whole = found["student: language model"] + found["student: adapter"] + found["vision encoder (shared)"]
    spread = memory.resident(models, replace(setup, zero=3))
    assert spread["student: weights (ZeRO-3 share)"] == whole / 8 and spread["student: gathered weights"] == 2e9
    assert spread["teacher: weights"] == found["teacher: weights"], "whole on every GPU"
    lora = memory.trained_parameters(models, replace(setup, lora_rank=128))
    # 24 layers: q, k, v, o of 2048 x 2048; gate, up, down of 2048 x 5504
    assert lora == 24 * 128 * (4 * 4096 + 3 * 7552) + 2560 * 2048 + 2048


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", ["alone", "teacher", "teacher of a smaller vocabulary"])
def test_the_answer_loss_at_work(suite, kind, trained):
    """Of three chunks of rows: what the allocator counts, within 3 %."""
    from measure import extra_memory

    size = configs.LanguageModel("m", "qwen2", 64, 1, 1, 1, 64, 64, 20_000)
    rows = 3 * memory.chunk_rows(size.vocab, 10_000, "cpu")
    hidden, head = torch.randn(2, rows, 64), torch.randn(2, size.vocab, 64)
    labels = torch.randint(0, 100, (rows,))
    mine, weight = hidden[0].clone().requires_grad_(), head[0].clone().requires_grad_(trained)
    theirs = (hidden[1], head[1]) if kind != "alone" else ()
    vocab = size.vocab - 16 if "smaller" in kind else None

    def call():
        return answer_loss(mine, weight, labels, *theirs, vocab_size=vocab)

    models = memory.Models(size, configs.TOWERS[configs.DEFAULT_TOWER], size, configs.Adapter(1, 64, 1))
    setup = memory.Setup(trained, kind != "alone", False, dtype="fp32", zero=0, rows=rows, device="cpu")
    work, kept = memory.answer_work(models, replace(setup, whole_vocabulary=vocab is None))
    given = 4 * 64 * rows * (1 + bool(theirs))  # the rows themselves were there
    assert extra_memory(call, torch.device("cpu")) * 2**20 == pytest.approx(work + kept - given, rel=0.03)


def test_eager_attention_would_keep_much_more_than_maps():
    models = pair_of(configs.LANGUAGE_MODELS["Qwen/Qwen1.5-1.8B"], configs.LANGUAGE_MODELS["Qwen/Qwen1.5-4B"])
    setup = memory.Setup(trains_llm=True, distils=True, aligns=True, batch=8, length=1024)
    eager = memory.eager_maps(models, setup)
    # Layers, samples, heads, pairs; a softmax in float32 and its copy in bf16; the teacher's copies alone.
    assert eager == (24 * 8 * 16 * 1024**2 * 6, 40 * 8 * 20 * 1024**2 * 2)
    maps = memory.phases(models, setup)["attention"]["attention maps"]
    # Of 9 layers: both models' maps, the loss's gradients; and what the loss works with.
    assert (
        maps == pytest.approx(4 * 8 * 1024 * 729 * (9 * 3 + 8 * 0.25 + 5.25 - 1), rel=1e-6) and maps < sum(eager) / 30
    )


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trains", [True, False])
def test_flops_are_those_that_pytorch_counts(trains, tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    config = config_of("qwen2", num_key_value_heads=2, vocab_size=256)
    sizes = read(config, tmp_path)
    model = build(config, attn_implementation="eager").requires_grad_(trains)
    hidden = torch.randn(1, 96, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        logits = model(inputs_embeds=hidden, use_cache=False).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    # Rotary tables are a product, too, of next to nothing.
    full = flops.layers_forward(sizes, 96, causal=False) + flops.head_forward(sizes, 96)
    assert forward == pytest.approx(full, rel=1e-3)
    attention = 2 * flops.attention_forward(sizes, 96)  # of all pairs
    backward = 2 * attention + (2 if trains else 1) * (full - attention)
    assert counter.get_total_flops() - forward == pytest.approx(backward, rel=1e-3)
    assert flops.layers_forward(sizes, 96) == flops.layers_forward(sizes, 96, causal=False) - attention / 2


def test_an_encoders_flops():
    from torch.utils.flop_counter import FlopCounterMode

    tower = configs.Tower("t", "siglip", 64, 3, 4, 96, 56, 14)
    config = transformers.SiglipVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = transformers.SiglipVisionModel(config)
        for module in model.modules():
            if isinstance(getattr(module, "head", None), nn.Module):
                module.head = nn.Identity()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(1, 3, 56, 56))
    assert flops.encoder_forward(tower) == counter.get_total_flops()


def test_a_steps_flops_add_up():
    models = pair_of(configs.LANGUAGE_MODELS["Qwen/Qwen1.5-1.8B"], configs.LANGUAGE_MODELS["Qwen/Qwen1.5-4B"])
    setup = memory.Setup(trains_llm=True, distils=True, aligns=True, checkpointing=False)
    student, teacher = (flops.layers_forward(model, 929) for model in (models.student, models.teacher))
    whole = flops.useful(models, setup, 929, 120)
    kd = flops.useful(models, replace(setup, aligns=False), 929, 120)
    sft = flops.useful(models, replace(setup, aligns=False, distils=False), 929, 120)
    assert 3 * student < sft < 3.6 * student
    assert kd - sft == teacher + flops.head_forward(models.teacher, 120)
    assert 0 < whole - kd < 0.03 * kd, "maps are a small part"
    again = flops.executed(models, replace(setup, checkpointing=True), 929, 120)
    assert again > flops.executed(models, setup, 929, 120) + student
    assert flops.steps(558_128, 256) == 2181 and flops.steps(665_298, 128) == 5198


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------
def test_methods_have_their_stages():
    for name, recipe in planner.RECIPES.items():
        method = find_method(name)
        assert tuple(recipe) == tuple(method.recipe)
        assert [stage for stage in recipe if recipe[stage].distils] == list(method.teacher_stages)
        assert bool(planner.ALIGNED[name]) == method.aligns_attention


def plan(*arguments: object, capsys) -> tuple[int, dict]:
    status = main(["plan", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_papers_run(capsys):
    status, found = plan(*PAIR, "--gpus", 8, "--gpu-memory", 48, capsys=capsys)
    assert status == 0 and found["fits"] and [stage["stage"] for stage in found["stages"]] == ["dpt", "dft", "sft"]
    for stage in found["stages"]:
        assert stage["batch"] * stage["accumulation"] * 8 == stage["global_batch"]
        assert (
            sum(stage["memory_gib"].values()) == pytest.approx(stage["peak_gib"]) == max(stage["moments_gib"].values())
        )
        assert stage["peak_gib"] <= 48 and stage["hours"] * 8 == pytest.approx(stage["gpu_hours"])
        assert stage["useful_tflop_per_sample"] < stage["tflop_per_sample"]
    dpt, dft, sft = found["stages"]
    assert "teacher: weights" in dft["memory_gib"] and "teacher: weights" not in sft["memory_gib"]
    assert "attention maps" in dft["memory_gib"] and "attention maps" not in dpt["memory_gib"]
    assert any("assum" in sentence.lower() or "Reserve" in sentence for sentence in found["assumptions"])
    assert (dpt["steps"], dft["steps"], sft["steps"]) == (2181, 5198, 5198)


@pytest.mark.parametrize(
    "student, teacher",
    [
        ("Qwen/Qwen1.5-1.8B", "Qwen/Qwen1.5-4B"),
        ("Qwen/Qwen1.5-1.8B", "Qwen/Qwen2.5-7B"),
        ("Qwen/Qwen1.5-0.5B", "Qwen/Qwen1.5-1.8B"),
        ("Qwen/Qwen1.5-0.5B", "Qwen/Qwen1.5-4B"),
        ("mtgv/MobileLLaMA-1.4B-Base", "mtgv/MobileLLaMA-2.7B-Base"),
    ],
)
def test_the_papers_pairs_fit_its_machine(student, teacher, capsys):
    """Tables 1, 6 and 7: eight GPUs of 48 GB."""
    status, found = plan("--student", student, "--teacher", teacher, "--gpus", 8, "--gpu", "L40S", capsys=capsys)
    assert status == 0 and [stage["stage"] for stage in found["stages"]] == ["dpt", "dft", "sft"]
    for stage in found["stages"]:
        assert 0 < stage["peak_gib"] < 48 and 0 < stage["gpu_hours"] < 2000, stage
    dpt, dft, sft = found["stages"]
    assert dpt["gpu_hours"] < dft["gpu_hours"] > sft["gpu_hours"]


@pytest.mark.skipif(not weights.have_stored_weights(), reason="no stored weights")
def test_the_miniatures_pair_from_its_folders(tmp_path, capsys):
    weights.install(tmp_path)
    pair = "--student", tmp_path / "qwen-student", "--teacher", tmp_path / "llava-teacher"
    status, found = plan(*pair, "--gpus", 1, "--gpu-memory", 8, "--samples", 4000, capsys=capsys)
    assert status == 0 and all(0 < stage["peak_gib"] < 8 for stage in found["stages"])
    assert found["stages"][1]["steps"] == 32  # of 128 samples


def test_the_table_in_the_readme(capsys):
    text = (SCRIPTS / "README.md").read_text()
    (line,) = re.findall(r"^llava-compodistill plan (--student Qwen.*)$", text, re.MULTILINE)
    _, found = plan(*shlex.split(line), capsys=capsys)
    for stage in found["stages"]:
        figures = stage["batch"], f"{stage['peak_gib']:.1f}", f"{stage['hours']:.1f}"
        assert f"| {stage['stage'].upper()} | {' | '.join(map(str, figures))} |" in text


def test_more_memory_means_larger_micro_batches(capsys):
    sizes = [
        plan(*PAIR, "--stage", "dft", "--gpus", 1, "--zero", 2, "--gpu-memory", size, capsys=capsys)[1]["stages"][0][
            "batch"
        ]
        for size in (48, 80, 141)
    ]
    assert sizes[0] < sizes[1] < sizes[2]
    given = plan(*PAIR, "--stage", "dft", "--batch", 2, capsys=capsys)[1]["stages"][0]
    assert given["batch"] == 2 and given["accumulation"] == 8


def test_a_smaller_student_is_one_that_the_teacher_can_teach(capsys):
    """Qwen2.5-1.5B is the smaller one by its vocabulary, and has more layers than this teacher."""
    status, found = plan(
        *("--student", "qwen1.5-1.8b", "--teacher", "qwen1.5-1.8b", "--stage", "dft", "--gpu-memory", 4), capsys=capsys
    )
    assert status == 1 and found


def test_what_to_change_where_nothing_fits(capsys):
    arguments = ["--student", "qwen2.5-7b", "--teacher", "Qwen/Qwen2.5-7B", "--stage", "dft", "--zero", 0]
    status, found = plan(*arguments, "--no-gradient-checkpointing", "--gpu-memory", 24, capsys=capsys)
    (stage,) = found["stages"]
    assert status == 1 and not stage["fits"] and not found["fits"]
    settings = [change["settings"] for change in stage["changes"]]
    assert settings == [
        "GRADIENT_CHECKPOINTING=True",
        "LAUNCHER=deepspeed",
        "LAUNCHER=deepspeed DEEPSPEED_CONFIG=scripts/zero3.json",
        "--teacher_dtype float8",
        "LORA=1",
    ]
    assert [change["fits"] for change in stage["changes"]] == [False, False, False, False, True]
    peaks = [change["peak"] for change in stage["changes"]]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] <= 24
    # Of one family, down to another model.
    arguments = ["--student", "qwen1.5-1.8b", "--teacher", "Qwen/Qwen1.5-7B", "--stage", "dft", "--lora"]
    _, found = plan(*arguments, "--gpu-memory", 12, capsys=capsys)
    last = found["stages"][0]["changes"][-1]
    assert last["settings"] == "TEACHER=./checkpoints/llava-qwen1.5-4b" and last["fits"]


def test_measured_speed(tmp_path, capsys):
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({"flops_per_second": {"dft": 1e14}, "device": "a GPU"}))
    _, found = plan(*PAIR, "--calibration", path, capsys=capsys)
    for stage in found["stages"]:  # those that were not measured at the mean of those that were
        assert stage["hours"] * 3600 == pytest.approx(stage["samples"] * stage["tflop_per_sample"] * 1e12 / 8e14)
    assert "measured" in found["assumptions"][1]
    _, found = plan(*PAIR, "--mfu", 0.5, "--gpu", "H100", "--samples", 1000, "--stage", "sft", capsys=capsys)
    (stage,) = found["stages"]
    assert stage["hours"] * 3600 == pytest.approx(1000 * stage["tflop_per_sample"] / (8 * 0.5 * 989))


def test_the_tables(capsys):
    assert main(["plan", *PAIR]) == 0
    printed = capsys.readouterr().out
    for part in (
        "teacher: weights",
        "optimizer states",
        "reserve (assumed)",
        "GPU hours",
        "eager attention would keep",
    ):
        assert part in printed
    assert "bash scripts/dft.sh\n" in printed, "a launch line is one line"
    assert main(["plan", *PAIR, "--gpu-memory", "12", "--stage", "dft"]) == 1
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed and "LORA=1" in printed and "bash scripts" not in printed


# ---------------------------------------------------------------------------------------------------------------------
# Launch lines
# ---------------------------------------------------------------------------------------------------------------------
VARIANTS = [
    [],
    ["--method", "kd"],
    ["--method", "sft"],
    ["--lora", "--lora-r", "64", "--zero", "3", "--max-length", "1024"],
    ["--gpus", "1", "--no-gradient-checkpointing", "--dtype", "fp16", "--gpu", "H200"],
    ["--zero", "0", "--global-batch", "64", "--projector", "mlp2x_gelu", "--gpu", "H200"],
    ["--tower", "openai/clip-vit-large-patch14-336"],
    ["--teacher-dtype", "float8"],
]


def words(line: str) -> tuple[dict[str, str], str, list[str]]:
    """Variables, script, flags."""
    parts = shlex.split(line)
    place = parts.index("bash")
    return dict(part.split("=", 1) for part in parts[:place]), parts[place + 1], parts[place + 2 :]


@pytest.mark.parametrize("more", VARIANTS, ids=" ".join)
def test_a_launch_line_runs_what_is_planned(more, capsys):
    _, found = plan(*PAIR, *more, capsys=capsys)
    shared = (SCRIPTS / "launch.sh").read_text()
    for stage in found["stages"]:
        settings, script, flags = words(stage["launch"])
        text = (SCRIPTS / Path(script).name).read_text() + shared
        for name in settings:
            assert re.search(rf"\$\{{?{name}\b", text), f"{script} reads no {name}"
        machine = {"GPUS": "8", "HAS_BF16": "1", "HAS_TF32": "1", "HAS_DEEPSPEED": "1", "DRY_RUN": "1"}
        environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **machine, **settings}
        done = subprocess.run(
            ["bash", script, *flags], cwd=SCRIPTS.parent, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        command = done.stdout.strip("\n").split("\n\n")[-1].split("\n")
        given = {flag: value for flag, value in zip(command, command[1:], strict=False) if flag.startswith("--")}
        assert given["--stage"] == stage["stage"]
        assert given["--per_device_train_batch_size"] == str(stage["batch"])
        assert given["--gradient_accumulation_steps"] == str(stage["accumulation"])
        assert given["--gradient_checkpointing"] == str(stage["gradient_checkpointing"])
        assert given.get("--lora_r", "0") == str(stage["lora_rank"])
        assert f"--{stage['dtype']}" in given
        config = Path(given.get("--deepspeed", "zero0.json")).name
        assert config in (f"zero{stage['zero']}.json", f"compodistill_zero{stage['zero']}.json")
        assert ("--method" in given) == ("kd" in more and stage["stage"] != "sft")
        assert given.get("--teacher_dtype", "auto") == (stage["teacher_dtype"] or "auto")
        assert (stage["teacher_dtype"] == "float8") == ("float8" in more and stage["stage"] != "sft")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------
GOOD = {"model_type": "qwen2", **{name: value for name, value in SIZES.items()}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json: cannot be read (No such file or directory)"),
        ("{", "config.json: is not JSON"),
        ([], "config.json: must hold a JSON object"),
        ({**GOOD, "hidden_size": None}, "config.json: the field hidden_size is None, and must be a whole number"),
        ({name: value for name, value in GOOD.items() if name != "vocab_size"}, "the field vocab_size is missing"),
        ({name: value for name, value in GOOD.items() if name != "model_type"}, "the field model_type is missing"),
        ({**GOOD, "model_type": "phi"}, "model_type 'phi' is not planned; qwen2, qwen3, llama, mistral are"),
        ({**GOOD, "num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({**GOOD, "hidden_size": 65}, "hidden_size 65 is no multiple of num_attention_heads 4"),
        ({**GOOD, "num_hidden_layers": True}, "the field num_hidden_layers is True"),
    ],
)
def test_a_config_that_cannot_be_used(config, message, tmp_path, capsys):
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    assert main(["plan", "--student", str(tmp_path), "--method", "sft"]) == 2
    error = capsys.readouterr().err
    assert message in error and str(tmp_path) in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "no/model", "--method", "sft"], "--student no/model: no such folder or file, and no model"),
        (["--student", "qwen1.5-1.8b"], "--teacher is missing: method compodistill distils"),
        ([*PAIR, "--stage", "pt"], "--stage pt: method compodistill has dpt, dft, sft, or all"),
        ([*PAIR, "--gpus", "3"], "--global-batch 256: is no multiple of --gpus 3"),
        ([*PAIR, "--batch", "3"], "--batch 3: the 32 samples that each GPU has"),
        ([*PAIR, "--max-length", "729"], "--max-length 729: an image alone has 729 tokens"),
        ([*PAIR, "--tower", "no/tower"], "--tower no/tower: no such folder or file, and no encoder"),
        (["--student", "qwen1.5-4b", "--teacher", "qwen1.5-1.8b"], "at least as many teacher layers as student"),
        ([*PAIR, "--calibration", "none.json"], "none.json: cannot be read"),
    ],
)
def test_wrong_input_is_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PAIR, "--gpus", "0"], "'0' must be a whole number of 1 or more"),
        ([*PAIR, "--mfu", "1.5"], "'1.5' must be above 0 and at most 1"),
        ([*PAIR, "--gpu-memory", "nan"], "'nan' must be a number above 0"),
        ([*PAIR, "--method", "llavadi"], "invalid choice: 'llavadi'"),
    ],
)
def test_wrong_values(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("found", [{}, {"flops_per_second": {}}, {"flops_per_second": {"dft": 0}}])
def test_a_calibration_that_cannot_be_used(found, tmp_path, capsys):
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(found))
    assert main(["plan", *PAIR, "--calibration", str(path)]) == 2
    assert f"{path}: " in (error := capsys.readouterr().err) and "flops_per_second" in error


def test_taf_with_another_encoder_than_the_teachers(tmp_path, capsys):
    teacher = {**GOOD, "model_type": "llava_qwen2", "mm_vision_tower": configs.DEFAULT_TOWER}
    (tmp_path / "config.json").write_text(json.dumps({**teacher, "num_hidden_layers": 24}))
    arguments = ["--student", "qwen1.5-0.5b", "--teacher", str(tmp_path)]
    other = ["--tower", "openai/clip-vit-large-patch14-336"]
    assert main(["plan", *arguments, *other]) == 2
    assert "TAF fetches the teacher's adapter" in capsys.readouterr().err
    _, apart = plan(*arguments, *other, "--projector", "mlp2x_gelu", "--stage", "dft", capsys=capsys)
    assert "teacher: vision encoder" in apart["stages"][0]["memory_gib"]
    _, found = plan(*arguments, "--stage", "dft", capsys=capsys)
    assert f"TEACHER={tmp_path}" in found["stages"][0]["launch"]
    assert "vision encoder (shared)" in found["stages"][0]["memory_gib"]


def test_it_runs_without_pytorch():
    code = (
        "import sys\n"
        "for name in ('llava', 'torch', 'transformers'): sys.modules[name] = None\n"
        "from llava_compodistill.cli import main\n"
        f"sys.exit(main(['plan', *{PAIR!r}, '--json']))"
    )
    path = os.pathsep.join(folder for folder in sys.path if folder)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
