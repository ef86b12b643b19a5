"""Where a frozen teacher lives changes nothing that it teaches, and what cannot run is refused by name."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from checks import PLAIN, assert_same_log
from factory import make_batch, make_model
from test_distributed import parallel_flags
from test_record import LAYOUTS, arguments, make_objective, state

from llava_compodistill.errors import FlagError
from llava_compodistill.hosts.llava.trained_towers import train_tower
from llava_compodistill.pair import placement
from llava_compodistill.pair.placement import Room, choose, place_teacher, student_bytes
from llava_compodistill.record.forward import Needs, record
from llava_compodistill.train import checks, placing, resume
from llava_compodistill.train.arguments import DataArguments, ModelArguments
from scale import modes

GIB = 2**30


@pytest.fixture
def pair(siglip):
    teacher = make_model(siglip, hidden=48, layers=6, heads=6, vocab=128, seed=1, dtype=torch.float32)
    return make_model(siglip, seed=2, dtype=torch.float32), teacher.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The same rows and maps
# ---------------------------------------------------------------------------------------------------------------------
def look(teacher):
    """Answer rows and attention maps of a teacher."""
    needs = Needs(head=frozenset({"answer"}), groups=frozenset({(1, 2), (5,)}))
    with torch.no_grad(), record(teacher, needs) as recorder:
        teacher(**make_batch(LAYOUTS, dtype=torch.float32).inputs, use_cache=False)
    found = recorder.latest
    return found.head["answer"].hidden, found.head["answer"].weights[0], *(found.maps[g] for g in sorted(found.maps))


def losses(student, teacher, folder, **changes):
    """A micro-batch's losses, and gradients of the student."""
    student.zero_grad()
    objective = make_objective(student, teacher, arguments(folder, **changes))
    with objective.running():
        sums = objective(student, make_batch(LAYOUTS, dtype=torch.float32).inputs)
        total = sum(part.loss for part in sums.values())
        total.backward()
    return [total.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)]


def test_an_offloaded_teacher_gives_equal_bits(pair, tmp_path):
    student, teacher = pair
    expected, whole = look(teacher), losses(student, teacher, tmp_path)
    place_teacher(teacher, "offload", torch.device("cpu"))
    layers = list(teacher.get_model().layers.parameters())
    assert all(weight.is_meta for weight in layers) and len(layers) > 6, "they are not on the device"
    assert not any(p.is_meta for n, p in teacher.named_parameters() if ".layers." not in n or "vision_tower" in n)
    before = state(teacher)
    hooked = [layer.forward for layer in teacher.get_model().layers]
    assert all(torch.equal(*both) for both in zip(look(teacher), expected, strict=True))
    assert all(torch.equal(*both) for both in zip(losses(student, teacher, tmp_path), whole, strict=True))
    assert state(teacher) == before and [layer.forward for layer in teacher.get_model().layers] == hooked
    assert all(weight.is_meta for weight in layers), "and have gone again"


def test_gradients_pass_through_an_offloaded_teacher(siglip, tmp_path):
    """Switch-KD runs the teacher on the student's features."""
    teacher = make_model(siglip, hidden=48, layers=6, heads=6, vocab=128, seed=1, dtype=torch.float32)
    student = make_model(siglip, seed=2, dtype=torch.float32, unfreeze_mm_vision_tower=True)
    train_tower(student.get_vision_tower())
    teacher.requires_grad_(False)
    whole = losses(student, teacher, tmp_path, method="switch_kd")
    place_teacher(teacher, "offload", torch.device("cpu"))
    again = losses(student, teacher, tmp_path, method="switch_kd")
    assert all(torch.equal(*both) for both in zip(again, whole, strict=True)) and len(again) > 20


#: Two processes: each places a copy of the same teacher, and compares what it gives with what the whole one gave.
SHARED = """
import torch
from factory import make_model
from test_placement import look
from llava_compodistill.pair.placement import place_teacher

if placement == "zero3":
    import deepspeed
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)  # compiled on first use, not needed
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
else:
    torch.distributed.init_process_group("gloo")
teacher = make_model(tower, hidden=48, layers=6, heads=6, vocab=128, seed=1, dtype=torch.float32).requires_grad_(False)
expected = look(teacher)
kept = place_teacher(teacher, placement, torch.device("cpu"))
def size(p):
    return p.to_local().numel() if hasattr(p, "to_local") else p.numel() + getattr(p, "ds_tensor", p[:0]).numel()
held = sum(map(size, teacher.get_model().layers.parameters()))
for again in range(2):
    for ours, theirs in zip(look(teacher), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
print("HELD", held)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_a_teacher_in_pieces_gives_the_same(ranks, kind, siglip, tmp_path):
    if kind == "fsdp" and placement.fully_shard() is None:
        pytest.skip("this torch has no FSDP2")
    if kind == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    code = f"placement, tower = {kind!r}, {str(siglip)!r}\n{SHARED}"
    done = ranks.python(code, tmp_path / "log", processes=2)
    assert done.ok, done.text[-6000:]
    held = [int(count) for count in re.findall(r"HELD (\d+)", done.text)]
    teacher = make_model(siglip, hidden=48, layers=6, heads=6, vocab=128, seed=1, dtype=torch.float32)
    whole = sum(p.numel() for p in teacher.get_model().layers.parameters())
    assert len(held) == 2 and all(count < 0.6 * whole for count in held), (held, whole)


@pytest.mark.invariant
@pytest.mark.parametrize("mode, kind", [("zero3", "zero3"), ("zero2", "zero3"), ("ddp", "fsdp"), ("fsdp2", "fsdp")])
@pytest.mark.long
def test_students_beside_a_teacher_in_pieces(ranks, dft, world, dpt_path, sharp_teacher, mixed, tmp_path, mode, kind):
    """However the student is wrapped, the losses are those of one process with a whole teacher."""
    if modes.missing(mode) or (kind == "fsdp" and placement.fully_shard() is None):
        pytest.skip(modes.missing(mode) or "this torch has no FSDP2")
    options = {**PLAIN, "per_device_train_batch_size": 1, "max_steps": 3, "mm_projector_type": "taf"}
    options["pretrain_mm_mlp_adapter"] = dpt_path / "mm_projector.bin"  # ZeRO-3 would draw another one
    _, expected = dft("one", gradient_accumulation_steps=2, **options)
    options |= {"teacher_placement": kind, **modes.flags(mode, tmp_path)}
    flags = parallel_flags(world, sharp_teacher, mixed, tmp_path / "two", sight_steps=None, **options)
    done = ranks.train_well(flags, 2, tmp_path / "log", modes.prelude(mode))
    assert f"Teacher: {kind}" in done.text
    assert_same_log(tiny.read_log(tmp_path / "two"), expected, 2e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What auto chooses
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "available, ranks, sharded, chosen",
    [
        (80, 8, "zero3", "replicate"),
        (28, 8, "zero3", "replicate"),  # 21 of 28: three quarters
        (27, 8, "zero3", "zero3"),
        (27, 8, "fsdp", "fsdp"),
        (27, 8, None, "offload"),
        (27, 1, "fsdp", "offload"),
        (16, 8, "fsdp", "offload"),
    ],
)
def test_auto_takes_what_fits(available, ranks, sharded, chosen):
    room = Room(layers=8 * GIB, rest=GIB, student=12 * GIB, available=available * GIB, ranks=ranks)
    found, reason = choose(room, sharded)
    assert found == chosen
    assert "21.0 GiB" in reason and f"75% of {available}.0 GiB" in reason


def test_what_training_takes_of_a_device():
    model = torch.nn.Linear(100, 10, bias=False)
    model.frozen = torch.nn.Parameter(torch.zeros(50, dtype=torch.bfloat16), requires_grad=False)
    assert student_bytes(model) == 100 + 16 * 1000
    assert student_bytes(model, zero_stage=2, ranks=4) == 100 + 4 * 1000 + 12 * 1000 // 4
    assert student_bytes(model, zero_stage=3, ranks=4) == (100 + 16 * 1000) // 4


def test_on_a_cpu_auto_leaves_the_teacher_whole_and_says_so_once(dft, caplog):
    caplog.set_level("INFO", logger="llava_compodistill")
    trainer, _ = dft("auto", max_steps=1)
    assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("Teacher: ")] == [
        "Teacher: replicate (auto: the device shares its memory with the host)."
    ]
    assert not any(p.is_meta for p in trainer.objective.teacher.parameters())


def test_a_run_with_an_offloaded_teacher_is_the_same_run(dft):
    expected, log = dft("whole", teacher_placement="replicate", max_steps=2)
    trainer, offloaded = dft("offloaded", teacher_placement="offload", max_steps=2)
    assert all(weight.is_meta for weight in trainer.objective.teacher.get_model().layers.parameters())
    assert [entry["loss"] for entry in offloaded] == [entry["loss"] for entry in log]
    both = zip(trainer.model.parameters(), expected.model.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in both)
    # The encoder is the student's, in either.
    assert trainer.objective.teacher.get_vision_tower() is trainer.model.get_vision_tower()


def test_a_run_may_go_on_with_another_placement_of_the_same_weights(tmp_path):
    whole, offloaded, quantised = (
        resume.describe(
            ModelArguments(), DataArguments(data_path="none.json"), arguments(tmp_path, teacher_placement=kind)
        )
        for kind in ("replicate", "offload", "4bit")
    )
    assert whole == offloaded
    assert {name for name in whole if whole[name] != quantised[name]} == {"teacher_placement"}


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------
def training(**changes):
    values = {
        "stage": "dft", "method": "compodistill", "distilled": True, "deepspeed": None, "world_size": 2, "fsdp": "",
        "device": torch.device("cpu"), "bits": 16, "lora_enable": True, "quant_type": "nf4",
        "teacher_placement": "auto", "teacher_dtype": "auto",
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher_placement": "offload", "distilled": False, "stage": "sft"}, "no teacher is in the loss"),
        ({"teacher_placement": "zero3"}, "add --deepspeed zero2.json or zero3.json, or use fsdp or offload"),
        ({"teacher_placement": "zero3", "deepspeed": "zero2.json", "world_size": 1}, "there is one: start several"),
        ({"teacher_placement": "fsdp", "world_size": 1}, "there is one: start several"),
        ({"teacher_placement": "8bit"}, "--teacher_placement 8bit: needs bitsandbytes, which is not installed"),
    ],
)
def test_a_placement_that_cannot_run_is_refused(monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=message):
        checks.check_placement(training(**changes))


def test_fsdp_needs_a_torch_that_has_it(monkeypatch):
    monkeypatch.setattr(checks, "fully_shard", lambda: None)
    with pytest.raises(ValueError, match="needs torch 2.6 or newer"):
        checks.check_placement(training(teacher_placement="fsdp"))


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_placement": "auto", "distilled": False},
        {"teacher_placement": "replicate", "world_size": 1},
        {"teacher_placement": "offload", "world_size": 1},
        {"teacher_placement": "zero3", "deepspeed": "zero2.json"},
    ],
)
def test_a_placement_that_can_run_is_not_refused(changes):
    checks.check_placement(training(**changes))


ZERO2, ZERO3 = (SimpleNamespace(is_zero3=lambda answer=answer: answer) for answer in (False, True))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 3}, "--bits 3: must be 4 or 8"),
        ({"stage": "dpt", "lora_enable": False}, "--stage dpt trains the adapter alone"),
        ({"lora_enable": False}, "add --lora_enable True"),
        ({"deepspeed": "zero3.json", "hf_deepspeed_config": ZERO3}, "ZeRO-3 cannot partition"),
        ({"fsdp": "full_shard"}, "not with --fsdp"),
        ({"quant_type": "int4"}, "--quant_type int4 is neither nf4 nor fp4"),
        ({}, "--bits 4: needs bitsandbytes, which is not installed: pip install"),
        ({"deepspeed": "zero2.json", "hf_deepspeed_config": ZERO2}, "needs bitsandbytes"),  # nothing else is wrong
    ],
)
def test_qlora_that_cannot_run_is_refused(monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=message):
        checks.check_bits(training(**{"bits": 4, **changes}))


def test_sixteen_bits_need_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    checks.check_bits(training(lora_enable=False))


@pytest.mark.parametrize("devices, modern, fits", [(None, True, False), ({"cuda", "cpu"}, True, True),
                                                   ({"cuda", "cpu"}, False, False)])  # fmt: skip
def test_bitsandbytes_without_kernels_for_the_device(monkeypatch, devices, modern, fits):
    """A stand-in: the package itself has not run in these tests."""
    from llava_compodistill import compat
    from llava_compodistill.hosts.llava.quantization import refuse_without_bitsandbytes

    package = SimpleNamespace(__version__="0.1", **({} if devices is None else {"supported_torch_devices": devices}))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setattr(compat, "QUANTISES_WITHOUT_CUDA", modern)
    refuse_without_bitsandbytes("--bits 4", "cuda")
    if fits:
        return refuse_without_bitsandbytes("--bits 4", "cpu")
    with pytest.raises(FlagError, match="--bits 4: bitsandbytes 0.1 and transformers .* cannot quantise on a CPU"):
        refuse_without_bitsandbytes("--bits 4", "cpu")


def test_the_command_line_refuses_before_anything_is_read(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FlagError, match="--teacher_placement 4bit: needs bitsandbytes"):
        tiny.run(world, "dft", tmp_path / "out", teacher_model_path="not/read", teacher_placement="4bit")
    with pytest.raises(FlagError, match="--bits 8: quantised weights cannot be trained themselves"):
        tiny.run(world, "dft", tmp_path / "out", teacher_model_path="not/read", bits=8)


def fake_trainer(method_switches=False, quantised=False, asked="fsdp", runs_blind=False):
    term = SimpleNamespace(
        switched_needs=lambda: Needs() if method_switches else None,
        blind_needs=lambda: Needs() if runs_blind else None,
    )
    teacher = torch.nn.Linear(1, 1)
    teacher.is_quantized = quantised
    args = SimpleNamespace(teacher_placement=asked, teacher_dtype="auto", method="switch_kd")
    return SimpleNamespace(objective=SimpleNamespace(terms=[term], teacher=teacher), args=args)


def test_a_method_that_learns_through_the_teacher_does_not_go_with_pieces_of_it():
    with pytest.raises(FlagError, match="--teacher_placement fsdp: gradients of --method switch_kd pass through"):
        placing.place(fake_trainer(method_switches=True))


@pytest.mark.parametrize("asked", ["fsdp", "zero3"])
def test_a_teacher_that_runs_once_more_on_some_ranks_is_not_in_pieces(asked):
    """Those that have no image would not gather its layers, and the others would wait for them."""
    with pytest.raises(FlagError, match=f"--teacher_placement {asked}: with --visual_advantage the teacher runs once"):
        placing.place(fake_trainer(runs_blind=True, asked=asked))


@pytest.mark.parametrize("asked, quantised", [("replicate", True), ("4bit", False)])
def test_a_teacher_loaded_for_another_placement(asked, quantised):
    with pytest.raises(FlagError, match=f"--teacher_placement {asked}: give it to load_teacher"):
        placing.place(fake_trainer(quantised=quantised, asked=asked))


# ---------------------------------------------------------------------------------------------------------------------
# QLoRA's student
# ---------------------------------------------------------------------------------------------------------------------
def test_a_quantised_student_is_readied_for_lora(siglip):
    from llava_compodistill.pair.student import prepare_quantised

    model = make_model(siglip, dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    prepare_quantised(model, torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    parts = ("mm_projector", "vision_tower", "embed_tokens", "lm_head")
    assert kept == {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "norm" in n and "tower" not in n)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in kept if "mm_projector" in n}
    assert all(torch.equal(p, before[n].to(p.dtype)) for n, p in model.named_parameters()), "no value is rounded"
