"""scripts/eval/*.sh in a LLaVA checkout, on the miniature's questions and its stored teacher: LLaVA's own modules for
LLaVA's six, ours for the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_compodistill import resources
from llava_compodistill.miniature import weights
from llava_compodistill.miniature.benchmarks import write_benchmarks

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not weights.have_stored_weights(), reason="no stored weights")]

#: Stands for LLaVA's converters, which its package leaves out: does what they do, as far as the scripts see it.
CONVERTER = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
source = flags.get("--src") or flags.get("--result-file") or (
    f"{flags['--dir']}/answers/{flags['--split']}/{flags['--ckpt']}/merge.jsonl")
target = flags.get("--dst") or flags.get("--result-upload-file") or (
    f"{flags['--dir']}/answers_upload/{flags['--split']}/{flags['--ckpt']}.json")
path = pathlib.Path(target)
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps([json.loads(line)["text"] for line in open(source)]))
"""


@pytest.fixture(scope="module")
def checkout(world, tmp_path_factory) -> Path:
    import llava

    root = tmp_path_factory.mktemp("LLaVA")
    shutil.copytree(Path(llava.__file__).parent, root / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(resources.folder("scripts") / "eval", root / "scripts" / "eval")
    write_benchmarks(world["data"], root / "playground" / "data" / "eval")
    weights.install(root / "checkpoints")
    return root


def script(checkout: Path, name: str, *flags: str, **settings: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "CONV_MODE": "qwen_qa",
        "MAX_NEW_TOKENS": "4",
        **settings,
    }
    command = ["bash", f"scripts/eval/{name}.sh", "checkpoints/llava-teacher", *flags]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def test_pope_is_scored_by_llava(checkout):
    done = script(checkout, "pope")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    accuracies = [float(value) for value in re.findall(r"Accuracy: ([\d.]+)", done.stdout)]
    assert len(accuracies) == 3 and min(accuracies) > 0.6  # of a few questions a part
    again = script(checkout, "pope")
    assert "Answered before" in again.stdout and again.stdout.count("Accuracy") == 3
    # Another template asks again, and so would another checkpoint of this name.
    assert "Answered before" not in script(checkout, "pope", CONV_MODE="qwen_1_5").stdout


def test_two_shares_give_the_answers_of_one(checkout):
    folder = checkout / "playground" / "data" / "eval" / "pope" / "answers"
    done = script(checkout, "pope")
    assert done.returncode == 0, done.stderr[-2000:]
    path = folder / "llava-teacher.jsonl"

    def answers():
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        return [(entry["question_id"], entry["text"]) for entry in entries]

    whole = answers()
    path.unlink()
    done = script(checkout, "pope", CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert answers() == whole and len(list((folder / "llava-teacher").glob("2_*.jsonl"))) == 2


def test_textvqa_is_scored_by_llava(checkout):
    done = script(checkout, "textvqa")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"Samples: \d+\nAccuracy: [\d.]+%", done.stdout)


def test_what_needs_more_says_so_and_keeps_its_answers(checkout):
    done = script(checkout, "mme")
    assert done.returncode == 0 and "No score yet" in done.stdout and "eval_tool" in done.stdout, done.stderr[-2000:]
    for name in ("gqa", "vizwiz", "vqav2"):
        done = script(checkout, name)
        assert done.returncode == 2 and "run this in a git checkout of LLaVA" in done.stderr
    for name in ("gqa_for_eval", "vizwiz_for_submission", "vqav2_for_submission"):
        (checkout / "scripts" / f"convert_{name}.py").write_text(CONVERTER)
    for name in ("gqa", "vizwiz", "vqav2"):
        done = script(checkout, name)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "No score yet" in done.stdout
        (written,) = re.findall(r"(?:in|upload) (\./playground\S+\.json)", done.stdout)[:1]
        assert len(json.loads((checkout / written).read_text())) > 4
    # The official scorer is called where the user has put it.
    (checkout / "playground/data/eval/gqa/data/eval.py").write_text("import sys; print('official', sys.argv[1:])")
    assert "official ['--tier', 'testdev_balanced']" in script(checkout, "gqa").stdout


@pytest.mark.parametrize("name", ["sugarcrepe", "sade", "bivlc", "winoground", "rbench", "reefknot"])
def test_our_own(checkout, name):
    flags = [] if name in ("rbench", "reefknot") else ["--protocol", "likelihood"]
    done = script(checkout, name, "--output", "out", "--device", "cpu", *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((checkout / "out" / f"{name}.json").read_text())["value"] is not None


def test_bad_input(checkout, tmp_path):
    def run(*command, **settings):
        return subprocess.run(
            ["bash", *command], cwd=checkout, env={**os.environ, "PYTHON": sys.executable, **settings},
            capture_output=True, text=True,
        )  # fmt: skip

    assert "usage: bash scripts/eval/pope.sh CKPT" in run("scripts/eval/pope.sh").stderr
    done = run("scripts/eval/pope.sh", "checkpoints/nothing")
    assert done.returncode == 2 and "checkpoint not found: checkpoints/nothing" in done.stderr
    done = run("scripts/eval/textvqa.sh", "checkpoints/llava-teacher", EVAL_DATA=str(tmp_path))
    assert done.returncode == 2 and "TextVQA_0.5.1_val.json is missing: see LLaVA's docs/Evaluation.md" in done.stderr
