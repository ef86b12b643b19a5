"""The benchmark scripts on the miniature's sizes: suites run (but compile and images; plan is in test_plan), their
parity holds, their figures can be drawn."""

from __future__ import annotations

import csv
import importlib
import os
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import transformers

from miniature import weights

pytestmark = pytest.mark.once  # the suites measure current transformers

SCRIPTS = Path(os.environ.get("COMPODISTILL_SOURCE", Path(__file__).resolve().parents[1])) / "scripts" / "benchmark"
CURRENT = int(transformers.__version__.split(".")[0]) >= 5


def run(script: str, *args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The CSV of all suites that this transformers can run, and its pictures."""
    path = tmp_path_factory.mktemp("benchmark") / "figures.csv"
    suites = "op,head,profile,sight,teacher,dtype,cache,eval"
    suites = suites.replace("head,", "head,step,fit,growth,") if CURRENT else suites
    done = run(
        "run.py",
        "--device",
        "cpu",
        "--preset",
        "miniature",
        "--suite",
        suites,
        "--seconds",
        0,
        "--threads",
        1,
        "--limit",
        0.01,
        "--samples",
        64,
        "--output",
        path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.mark.long
def test_every_variant_has_its_figures(measured):
    found = rows(measured)
    expected = {"op": {"eager", "chunked"}, "head": {"all positions", "answer rows", "ours"}}
    if CURRENT:
        expected |= {suite: {"usual", "KD only", "ours"} for suite in ("step", "fit")}
    for suite, variants in expected.items():
        mine = [row for row in found if row["suite"] == suite]
        assert {row["variant"] for row in mine} >= variants
        for row in mine:
            assert "FAILED" not in row["parity"] and float(row["parity"]) < 1e-4
            if suite != "fit":
                assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
                assert float(row["extra_mib"]) > 0
    rates = {row["variant"]: float(row["samples_per_s"]) for row in found if row["suite"] == "eval"}
    likelihoods = {"one by one, likelihood", "one by one, generated letters", "ours, likelihood"}
    assert set(rates) == likelihoods | {"LLaVA's model_vqa_loader", "ours, the same prompts"}
    assert [row["parity"] for row in found if row["variant"] == "ours, the same prompts"] == ["0.0e+00"]
    assert any(row["suite"] == "profile" and "%" in row["note"] for row in found)
    assert all(row["device"] and row["torch"] == torch.__version__ and "run.py" in row["command"] for row in found)


@pytest.mark.long
def test_the_sight_guard_takes_below_one_percent(measured):
    """At the quick start's settings; the figures themselves are those of a busy machine."""
    found = {row["variant"]: row for row in rows(measured) if row["suite"] == "sight"}
    cost = float(found.pop("measurement")["p50_ms"])
    assert found.keys() == {"dft", "sft", "pt"}
    for row in found.values():
        assert float(row["sight_share"]) == pytest.approx(cost / (200 * float(row["p50_ms"])), rel=0.01)
        assert float(row["sight_share"]) < 0.01 and row["note"].endswith("with 32 samples a step")


@pytest.mark.long
@pytest.mark.skipif(not CURRENT, reason="the whole step is measured on current transformers")
def test_a_step_and_its_fit(measured):
    found = rows(measured)
    memory = {row["variant"]: float(row["extra_mib"]) for row in found if row["suite"] == "step"}
    assert memory["ours"] < memory["usual"]
    batch = {row["variant"]: int(row["batch"]) for row in found if row["suite"] == "fit"}
    assert 1 <= batch["usual"] < batch["ours"]
    assert all(float(row["flops_share"]) > 0 for row in found if row["suite"] == "step")


@pytest.mark.long
@pytest.mark.skipif(not CURRENT, reason="the whole step is measured on current transformers")
def test_growth_has_its_exponents(measured):
    found = [row for row in rows(measured) if row["suite"] == "growth"]
    memory = {(row["variant"], row["note"].split(":")[0]): row["memory_exponent"] for row in found}
    # All positions have logits of their own; ours has those of the answer rows.
    assert float(memory["head, all positions", "positions"]) > 0.8 > 0.3 > float(memory["head, ours", "positions"])
    assert float(memory["map, eager", "N"]) > 1.5
    sizes = {kind for variant, kind in memory if variant == "step, ours"}
    assert sizes >= {"N", "B", "layers aligned"}


def test_exponents(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    exponent = importlib.import_module("growth").exponent
    assert exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1) and exponent([1, 3, 9], [2, 18, 162]) == pytest.approx(
        2
    )
    assert exponent([8, 16], [5, 5]) == 0


@pytest.mark.long
def test_placements_of_the_teacher(measured):
    """An offloaded one gives equal bits with fewer weights on the device; what cannot run says why."""
    found = {row["variant"]: row for row in rows(measured) if row["suite"] == "teacher"}
    assert list(found) == ["replicate", "offload", "8bit", "4bit"]
    kept = {}
    for name in ("replicate", "offload"):
        assert found[name]["parity"] == "0.0e+00" and float(found[name]["p50_ms"]) > 0
        size, text = found[name]["note"].split(" MiB of weights on the device, ")
        assert text.endswith("cosine 1.0000")
        kept[name] = float(size)
    assert 0 < kept["offload"] < kept["replicate"]
    for name in ("8bit", "4bit"):
        assert "cosine" in found[name]["note"] or found[name]["note"].startswith(
            f"not run: --teacher_placement {name}: "
        )


@pytest.mark.long
def test_precisions_of_the_teacher(measured):
    """Beside float32 a trained teacher's targets change, the more the fewer bits it has."""
    found = {row["variant"]: row for row in rows(measured) if row["suite"] == "dtype"}
    assert list(found) == ["float32", "float16", "bfloat16", "float8", "8bit", "4bit"]
    assert found["float16"]["note"].startswith("not run: --fp16 True: there is no fp16 training on a CPU")
    for name in ("8bit", "4bit"):
        assert "cosine" in found[name]["note"] or f"--teacher_placement {name}: needs" in found[name]["note"]
    kl, bytes_ = {}, {}
    for name in ("float32", "bfloat16", "float8"):
        kl[name] = float(re.match(r"KL (\S+) ", found[name]["note"])[1])
        bytes_[name] = float(found[name]["measured_mib"])
        assert 0.9 < float(re.search(r"cosine (\S+) ", found[name]["note"])[1]) < 1.000001
        assert int(found[name]["rows"]) > 64 and float(found[name]["p50_ms"]) > 0
    assert abs(kl["float32"]) < 1e-9 < kl["bfloat16"] < kl["float8"] < 0.1
    assert bytes_["bfloat16"] == pytest.approx(bytes_["float32"] / 2, rel=1e-3)
    assert bytes_["float8"] < 0.62 * bytes_["bfloat16"]


@pytest.mark.long
def test_a_step_from_a_cache(measured):
    """What is stored whole gives the teacher's gradients in no more memory, and fewer bits are fewer bytes."""
    found = {row["variant"]: row for row in rows(measured) if row["suite"] == "cache"}
    live = found.pop("with the teacher")
    steps = {name: row for name, row in found.items() if not name.startswith(("reading: ", "making: "))}
    assert len(steps) == 5
    assert found.keys() == {*steps, *(f"{part}: {name}" for name in steps for part in ("reading", "making"))}
    assert all(float(row["extra_mib"]) < 1.2 * float(live["extra_mib"]) for row in steps.values())
    exact = steps["all tokens, 32 bits; all rows, 32 bits"]
    assert float(exact["parity"]) < 1e-4
    size = {name: float(row["note"].split(" kB")[0].replace(",", "")) for name, row in steps.items()}
    assert (
        size["16 tokens, 8 bits; all rows, 4 bits"] < size["64 tokens, 8 bits; all rows, 8 bits"] < max(size.values())
    )


@pytest.mark.long
def test_pictures(measured):
    done = run("plot.py", measured)
    assert done.returncode == 0, done.stderr
    pictures = sorted(path.name for path in measured.parent.glob("*.png"))
    suites = ["fit", "head", "op", "step"] if CURRENT else ["head", "op"]
    assert pictures == [f"figures-{suite}.png" for suite in suites]
    assert all(path.stat().st_size > 5_000 for path in measured.parent.glob("*.png"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run.py", "--suite", "speed"], "unknown speed; there are op, head"),
        (["run.py", "--suite", "op", "--length", "long"], "'long': must be whole numbers"),
        (["plot.py", "missing.csv"], "missing.csv: No such file"),
    ],
)
def test_errors(args, message, monkeypatch, capsys):
    """In this process, where PyTorch is loaded already."""
    script = str(SCRIPTS / args[0])
    monkeypatch.setattr(sys, "argv", [script, *args[1:]])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    printed = capsys.readouterr()
    assert end.value.code not in (0, None)
    assert message in f"{printed.out}{printed.err}{end.value.code}"


@pytest.mark.long
def test_the_gpus_order_is_rehearsed_step_by_step_and_goes_on(tmp_path):
    environment = {**os.environ, "REHEARSE": "1", "PYTHON": sys.executable, "RESULTS": str(tmp_path / "out")}
    environment.pop("OUT", None)

    def gpu(*steps: str, **more: str) -> subprocess.CompletedProcess:
        command = ["bash", str(SCRIPTS / "gpu.sh"), *steps]
        return subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, timeout=300)

    stopped = gpu("step", LIMIT="1")
    assert stopped.returncode == 1 and "stopped after 1 s" in stopped.stdout and "stopped: step" in stopped.stderr
    assert not (tmp_path / "out" / "step.done").exists()
    done = gpu("op")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"op.csv", "op.log", "op.done", "op-op.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert all(row["device"] for row in rows(tmp_path / "out" / "op.csv"))
    assert gpu("ops").returncode == 2
    late = gpu("op", "head", BUDGET="1", OUT=str(tmp_path / "home"))
    assert late.returncode == 1 and "no time was left for: " in late.stderr and "head" in late.stderr
    with tarfile.open(tmp_path / "home" / "results.tar.gz") as archive:
        assert {"./op.csv", "./op.log", "./environment.txt"} <= set(archive.getnames())


@pytest.mark.long
@pytest.mark.skipif(not weights.have_stored_weights(), reason="no stored weights")
def test_a_manifest_is_checked(tmp_path):
    done = run("run.py", "--device", "cpu", "--suite", "check", "--records", 300, "--output", tmp_path / "check.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = rows(tmp_path / "check.csv")
    assert row["note"].startswith("300 records") and row["note"].endswith("status 0")
    assert float(row["p50_ms"]) > 0 and float(row["extra_mib"]) > 10


def test_the_loader_suite(tmp_path, monkeypatch):
    """In this process, on a few small images."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    loader = importlib.import_module("loader")
    monkeypatch.setattr(loader, "SIZES", ((40, 30),))
    monkeypatch.setattr(loader, "PIXELS", 28)
    found = list(loader.run(str(tmp_path), 0))
    costs = {row["variant"]: row for row in found if "p50_ms" in row}
    assert {"open and decode", "text", "collate", "sample, processor"} <= costs.keys()
    assert all(row["p50_ms"] > 0 and row["samples_per_s"] > 0 for row in costs.values())
    assert all(row["parity"] == ("equal" if "table" in name else "") for name, row in costs.items())
    needed = [row["note"] for row in found if row["variant"].startswith("workers")]
    assert needed and all("40 x 30; workers for samples a second: 1 for 2" in note for note in needed)
    assert [loader.workers(33, rate) for rate in (100, 33, 32, 10)] == [1, 1, 2, 4]


def test_the_pack_suite(tmp_path, monkeypatch):
    """In this process: the shares of padding, and steps whose gradients agree."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    pack, presets = (importlib.import_module(name) for name in ("pack", "presets"))
    monkeypatch.setattr(pack, "SAMPLES", 1000)
    sizes = presets.MINIATURE.pair
    models = importlib.import_module("pair").Pair(sizes, torch.device("cpu"), tmp_path, checkpointing=False)
    seen = set()
    network = models.student.get_model().layers[0].mlp
    network.register_forward_pre_hook(lambda module, args: seen.add(args[0].shape[0]))
    found = list(pack.run(models, str(tmp_path), (4,), 0))
    assert seen == {1, 4}, "padded batches, and tokens without padding"
    padding = {(row["variant"], row["batch"]): row["padding_share"] for row in found if "p50_ms" not in row}
    assert len(padding) == 10 and padding[pack.PACKED, 1] == 0
    for size in pack.BATCHES:
        assert 0 < padding[pack.BY_LENGTH, size] < padding[pack.PLAIN, size] < 0.7
    assert padding[pack.PLAIN, 4] < padding[pack.PLAIN, 16]
    timed = {row["variant"]: row for row in found if "p50_ms" in row}
    assert timed.keys() == {pack.PLAIN, pack.BY_LLAVA, pack.BY_LENGTH, pack.FREE, pack.PACKED}
    assert all(float(row["parity"]) < 1e-3 and row["tokens_per_s"] > 0 for row in timed.values())
    samples = pack.draw(500, 9)
    assert all(
        sum(map(len, pack.grouped(samples, 4, policy, 24, 32))) == 500 for policy in timed if policy != pack.FREE
    )
    assert max(sample.length for sample in samples) == round(2048 * 9 / 576)
