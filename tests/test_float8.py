"""--teacher_dtype float8: what rounding does to a weight, that nothing else happens, and who may not have it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from factory import make_batch, make_model
from safetensors.torch import load_file
from test_placement import fake_trainer, look, losses, training
from test_record import LAYOUTS

from llava_compodistill.errors import CacheError, FlagError
from llava_compodistill.pair import float8
from llava_compodistill.pair.placement import place_teacher, weights_bytes
from llava_compodistill.pair.student import set_trainable
from llava_compodistill.train import checks, placing
from llava_compodistill.train.cache import cli, shards
from llava_compodistill.train.plan import configs, memory
from llava_compodistill.train.run import teacher_dtype


def numbers() -> torch.Tensor:
    """All finite numbers of e4m3 that are not negative, by the format's definition, in float64: 0 to 448."""
    found = []
    for code in range(0x7F):  # 0x7f is NaN
        exponent, mantissa = code >> 3, code & 7
        found.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return torch.tensor(found, dtype=torch.float64)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """An independent reference in float64, number by number: the nearest of the format's, of two as near the one whose
    last bit is 0, with the smallest power of two that brings a row into its range."""
    known, result = numbers().tolist(), weight.double().clone()
    for row in result:
        largest = row.abs().max().item()
        scale = 2.0 ** max(-24, math.ceil(math.log2(largest / 448))) if largest else 1.0
        for place, value in enumerate(row.tolist()):
            near = min(range(len(known)), key=lambda code: (abs(known[code] - abs(value) / scale), code & 1))  # noqa: B023
            row[place] = math.copysign(known[near] * scale, value)
    return result


def matrix(dtype: torch.dtype) -> torch.Tensor:
    """Rows of any size: ordinary, with an outlier, tiny, huge, zero, and with exact powers of two and ties."""
    weight = torch.randn(8, 24) * torch.tensor([0.02, 1e-3, 0.02, 1e-6, 30.0, 1.0, 1.0, 1.0])[:, None]
    weight[2, 3] = 5.0
    weight[5] = 0.0
    weight[6] = 2.0 ** -torch.arange(24)
    weight[7] = torch.tensor(1.0625) * torch.arange(24)  # between two numbers of the format
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_rounded_once(dtype):
    weight = matrix(dtype)
    held, scale = float8.quantise(weight)
    assert held.dtype == torch.float8_e4m3fn and held.element_size() == 1
    assert scale.shape == (8, 1) and scale.dtype == dtype
    fraction, _ = torch.frexp(scale.float())
    assert (fraction == 0.5).all(), "powers of two"
    expected = rounded(weight)
    assert torch.equal(held.double() * scale.double(), expected)
    # What a product takes is that very number, where the precision can write it down (float16 ends at 2 ** -24).
    product = (held.to(dtype) * scale).double()
    assert torch.equal(product, expected.to(dtype).double())
    if dtype != torch.float16:
        assert torch.equal(product, expected)
    # Three bits of mantissa: within a sixteenth; below the format's least exponent within half its smallest step.
    apart = (weight.double() - expected).abs()
    assert (apart <= torch.maximum(weight.double().abs() / 16, scale.double() * 2.0**-10)).all()
    largest = weight.double().abs().amax(dim=1) / scale.double()[:, 0]
    ordinary = largest[[0, 1, 2, 4, 6, 7]]
    assert ((ordinary > 224) & (ordinary <= 448)).all(), "no bit of the range is given away"


@pytest.fixture
def teachers(siglip):
    """A teacher in float8, and one whose weights were rounded to the same numbers."""
    made = [
        make_model(siglip, hidden=48, layers=6, heads=6, vocab=128, seed=1, dtype=torch.float32).requires_grad_(False)
        for _ in range(2)
    ]
    for layer in made[1].get_model().layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = rounded(module.weight.data).to(torch.float32)
    before = {name: value.clone() for name, value in made[0].state_dict().items()}
    float8.hold_in_float8(made[0])
    return *made, before


def test_a_teacher_in_float8_is_one_whose_matrices_were_rounded(teachers, siglip, tmp_path):
    teacher, expected, before = teachers
    assert float8.is_float8(teacher) and not float8.is_float8(expected)
    assert all(torch.equal(*both) for both in zip(look(teacher), look(expected), strict=True))
    student = make_model(siglip, seed=2, dtype=torch.float32)
    mine, theirs = (losses(student, each, tmp_path) for each in (teacher, expected))
    assert all(torch.equal(*both) for both in zip(mine, theirs, strict=True)) and len(mine) > 20
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    held = {name for name, value in teacher.named_parameters() if value.dtype == torch.float8_e4m3fn}
    assert len(held) == 6 * 7 and all(".layers." in name and "vision_tower" not in name for name in held)
    for name, value in teacher.state_dict().items():  # all else as it was
        if name not in held and not name.endswith(".scale"):
            assert torch.equal(value, before[name]), name


def test_gradients_pass_through_float8(teachers, siglip, tmp_path):
    """Switch-KD runs the teacher on the student's features."""
    from llava_compodistill.hosts.llava.trained_towers import train_tower

    found = []
    for teacher in teachers[:2]:
        student = make_model(siglip, seed=2, dtype=torch.float32, unfreeze_mm_vision_tower=True)
        train_tower(student.get_vision_tower())
        found.append(losses(student, teacher, tmp_path, method="switch_kd"))
    assert all(torch.equal(*both) for both in zip(*found, strict=True)) and len(found[0]) > 20


def test_in_host_memory(teachers):
    teacher, expected, _ = teachers
    place_teacher(teacher, "offload", torch.device("cpu"))
    assert all(weight.is_meta for weight in teacher.get_model().layers.parameters())
    assert all(torch.equal(*both) for both in zip(look(teacher), look(expected), strict=True))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float8"])
def test_the_planner_counts_it_to_the_byte(siglip, dtype):
    held = {"float32": torch.float32}.get(dtype, torch.bfloat16)
    teacher = make_model(siglip, hidden=48, layers=6, heads=6, kv_heads=2, vocab=128, dtype=held)
    if dtype == "float8":
        float8.hold_in_float8(teacher)
    sizes = configs.LanguageModel("t", "qwen2", 48, 6, 6, 2, 8, 96, 128, qkv_bias=True)
    models = memory.Models(sizes, configs.TOWERS[configs.DEFAULT_TOWER], sizes, configs.Adapter(64, 48, 2))
    setup = memory.Setup(True, True, True, teacher_dtype=dtype)
    assert memory.resident(models, setup)["teacher: weights"] == sum(weights_bytes(teacher))
    if dtype == "float8":
        wider = memory.phases(models, setup)["teacher"]["teacher at work"]
        plain = memory.phases(models, memory.Setup(True, True, True))["teacher"]["teacher at work"]
        assert wider - plain in (0, 2 * 2 * 48 * 96)  # a matrix of the network, in bfloat16, twice


def test_a_run(dft, caplog, tmp_path):
    """The log says it, the targets change a little, the teacher not at all, and the checkpoint is an ordinary one."""
    caplog.set_level("INFO", logger="llava_compodistill")
    plain, expected = dft("plain", max_steps=2)
    trainer, found = dft("float8", max_steps=2, teacher_dtype="float8")
    assert "Teacher: replicate, float8 (auto: the device shares its memory with the host)." in caplog.messages
    teacher, whole = trainer.objective.teacher, plain.objective.teacher
    for (name, mine), (_, theirs) in zip(teacher.named_modules(), whole.named_modules(), strict=True):
        if isinstance(mine, float8.Float8Linear):
            both = zip((mine.weight, mine.scale), float8.quantise(theirs.weight), strict=True)
            assert all(torch.equal(*each) for each in both), name
    assert sum(isinstance(module, float8.Float8Linear) for module in teacher.modules()) == 6 * 7
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert found[0]["lm"] == expected[0]["lm"]
    assert found[0]["kl"] != expected[0]["kl"] and found[0]["kl"] == pytest.approx(expected[0]["kl"], rel=0.3)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "float8")]
    assert [{n: (v.shape, v.dtype) for n, v in each.items()} for each in weights] == [
        {n: (v.shape, v.dtype) for n, v in weights[0].items()}
    ] * 2
    assert "float8" not in (tmp_path / "float8" / "config.json").read_text()
    set_trainable(trainer.model, "dft")  # the student alone is unfrozen
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_cache_knows_it(world, sharp_teacher, mixed, tmp_path, capsys):
    """A cache is not gone on with in another precision."""
    flags = tiny.flags(world, "dft", "unused", teacher_model_path=sharp_teacher, data_path=mixed, vat=False)
    command = ["--output", str(tmp_path / "cache"), "--top_k", "8", *flags]
    assert cli.main([*command, "--teacher_dtype", "float8"]) == 0
    assert shards.read_settings(tmp_path / "cache")["teacher_dtype"] == "float8"
    with pytest.raises(CacheError, match='--teacher_dtype: "float8" there, "float32" in this command'):
        cli.main(command)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"distilled": False, "stage": "sft"}, "no teacher is in the loss of --stage sft"),
        ({"teacher_placement": "8bit"}, "--teacher_placement 8bit quantises the same weights"),
        ({"teacher_placement": "zero3"}, "--teacher_placement zero3 shares layers of one precision: use replicate"),
        ({"teacher_placement": "fsdp"}, "--teacher_placement fsdp shares layers of one precision"),
    ],
)
def test_who_may_not_have_it(changes, message):
    with pytest.raises(ValueError, match=f"--teacher_dtype float8: {message}"):
        checks.check_float8(training(teacher_dtype="float8", **changes))


@pytest.mark.parametrize("changes", [{}, {"teacher_placement": "replicate"}, {"teacher_placement": "offload"}])
def test_who_may(changes):
    checks.check_float8(training(teacher_dtype="float8", **changes))
    checks.check_float8(training(teacher_dtype="bfloat16", teacher_placement="8bit"))


def test_the_command_line_refuses_before_anything_is_read(world, tmp_path):
    with pytest.raises(FlagError, match="--teacher_dtype float8: no teacher is in the loss of --stage sft"):
        tiny.run(world, "sft", tmp_path / "out", model_name_or_path="not/read", teacher_dtype="float8")


@pytest.mark.parametrize("asked", ["float8", "auto"])
def test_a_teacher_loaded_otherwise(asked, teachers):
    trainer = fake_trainer(asked="replicate")
    trainer.objective.teacher, trainer.args.teacher_dtype = teachers[asked == "float8"], asked
    with pytest.raises(FlagError, match=rf"--teacher_dtype {asked}: give it to load_teacher\(..., float8="):
        placing.place(trainer)


def test_auto_never_shares_its_layers(teachers, monkeypatch):
    """Where FSDP would be chosen, it is held in host memory."""
    trainer = fake_trainer(asked="auto")
    trainer.objective.teacher, trainer.args.teacher_dtype = teachers[0], "float8"
    asked = []
    monkeypatch.setattr(placing, "decide", lambda *args: asked.append(args[-1]) or ("replicate", "so"))
    monkeypatch.setattr(placing, "student_bytes", lambda *args: 0)
    trainer.accelerator = SimpleNamespace(num_processes=2, state=SimpleNamespace(deepspeed_plugin=None))
    trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
    trainer.args.device, trainer.model = torch.device("cpu"), None
    placing.place(trainer)
    assert asked == [None]


def test_a_forward_under_autocast_runs(teachers):
    """As the trainer runs it in a bf16 stage."""
    teacher = teachers[0].to(torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        outputs = teacher(**make_batch(LAYOUTS, dtype=torch.float32).inputs, use_cache=False)
    assert outputs.logits.isfinite().all()


@pytest.mark.parametrize(
    "bf16, asked, computes",
    [
        (True, "auto", "bfloat16"),
        (True, "float8", "bfloat16"),
        (False, "float8", "float32"),
        (True, "float32", "float32"),
    ],
)
def test_what_a_teacher_computes_in(bf16, asked, computes):
    """By default what the step does: a bf16 run has its teacher in bf16."""
    args = SimpleNamespace(bf16=bf16, fp16=False, teacher_dtype=asked)
    assert teacher_dtype(args) == getattr(torch, computes)
