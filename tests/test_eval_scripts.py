"""scripts/eval/*.sh in a LLaVA checkout, on the miniature's questions: a student that was distilled for them, and
the stored teacher, which has learned to see."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from llava_compodistill import about
from llava_compodistill.cli import main
from llava_compodistill.eval.benchmarks import registered
from llava_compodistill.eval.benchmarks.base import EngineBenchmark
from miniature import weights
from miniature.benchmarks import write_benchmarks

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not weights.have_stored_weights(), reason="no stored weights")]

EVAL = Path("playground/data/eval")


@pytest.fixture(scope="module")
def checkout(distilled, tmp_path_factory) -> Path:
    import llava

    root = tmp_path_factory.mktemp("LLaVA")
    shutil.copytree(Path(llava.__file__).parent, root / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(about.folder("scripts") / "eval", root / "scripts" / "eval")
    write_benchmarks(distilled / "data", root / EVAL)
    weights.install(root / "checkpoints")
    (root / "checkpoints" / "llava-student").symlink_to(distilled / "llava-student")
    return root


def command(name: str, *flags: str, model: str = "llava-student") -> list[str]:
    return ["bash", f"scripts/eval/{name}.sh", f"checkpoints/{model}", *flags]


@pytest.fixture(scope="module", autouse=True)
def python(warm_python):
    """Starting Python is what these tests would wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PYTHON, "path", warm_python)
        yield


PYTHON = {"path": sys.executable}


def environment(**settings: str) -> dict[str, str]:
    mine = {"PYTHON": PYTHON["path"], "OMP_NUM_THREADS": "1", "CONV_MODE": "qwen_qa", "MAX_NEW_TOKENS": "4"}
    return {**os.environ, **mine, **settings}


def script(checkout: Path, name: str, *flags: str, model: str = "llava-student", **settings: str):
    done = subprocess.run(
        command(name, *flags, model=model), cwd=checkout, env=environment(**settings), capture_output=True, text=True
    )
    return done


def passed(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def answers(path: Path) -> list[tuple]:
    return [(a["question_id"], a["prompt"], a["text"]) for a in map(json.loads, path.read_text().splitlines())]


@pytest.fixture(scope="module")
def pope(checkout) -> str:
    """What pope.sh prints for the teacher."""
    return passed(script(checkout, "pope", model="llava-teacher"))


@pytest.fixture(scope="module")
def textvqa(checkout) -> str:
    return passed(script(checkout, "textvqa", model="llava-teacher"))


@pytest.mark.once  # in the other environment it is one of the twelve
def test_pope_is_scored_by_llava_and_from_the_records(checkout, pope):
    accuracies = [float(value) for value in re.findall(r"Accuracy: ([\d.]+)", pope)]
    assert len(accuracies) == 3 and min(accuracies) > 0.6  # of a few questions a part
    summary = json.loads((checkout / "checkpoints" / "llava-teacher" / "eval" / "pope.json").read_text())
    assert summary["figures"]["accuracy"] == pytest.approx(100 * sum(accuracies) / 3)
    assert summary["value"] == pytest.approx(summary["printed"]["f1"]) and f"{summary['value']:.1f}" in pope
    records = (checkout / "checkpoints" / "llava-teacher" / "eval" / "pope.jsonl").read_text().splitlines()
    assert len(records) == summary["items"] and {json.loads(line)["label"] for line in records} == {"yes", "no"}


@pytest.mark.once
def test_answers_of_another_run_are_kept(checkout, pope):
    path = checkout / EVAL / "pope" / "answers" / "llava-teacher.jsonl"
    summary = checkout / "checkpoints" / "llava-teacher" / "eval" / "pope.json"
    before, summed = path.read_bytes(), summary.read_bytes()
    done = script(checkout, "pope", model="llava-teacher", CONV_MODE="qwen_1_5")
    assert summary.read_bytes() == summed
    assert done.returncode == 2 and "template 'qwen_qa', not 'qwen_1_5'" in done.stderr
    assert path.read_bytes() == before
    other = {"CONV_MODE": "qwen_1_5", "MODEL_NAME": "other", "OUTPUT": "other"}
    passed(script(checkout, "pope", model="llava-teacher", **other))
    assert path.read_bytes() == before and path.with_name("other.jsonl").is_file()


@pytest.mark.once
@pytest.mark.long
def test_shares_give_the_answers_of_one(checkout, pope):
    path = checkout / EVAL / "pope" / "answers" / "llava-teacher.jsonl"
    whole = answers(path)
    printed = passed(script(checkout, "pope", model="llava-teacher", CUDA_VISIBLE_DEVICES="0,1", OVERWRITE="1"))
    assert f"{len(whole)} questions to ask under the template qwen_qa, in 2 process(es)" in printed
    assert answers(path) == whole


@pytest.mark.once
def test_a_killed_run_asks_only_what_is_left_and_has_the_same_summary(checkout, textvqa):
    path = checkout / EVAL / "textvqa" / "answers" / "llava-teacher.jsonl"
    summary = checkout / "checkpoints" / "llava-teacher" / "eval" / "textvqa.json"
    whole, before = path.read_text().splitlines(), summary.read_text()
    path.unlink()
    folder = path.with_suffix("")
    folder.mkdir()
    # As a kill leaves a share of two: its last line cut.
    (folder / "2_0.jsonl").write_text("\n".join(whole[:6]) + "\n" + whole[6][:20])
    summary.unlink()
    printed = passed(script(checkout, "textvqa", model="llava-teacher"))
    assert f"{len(whole) - 6} questions to ask" in printed
    assert summary.read_text() == before and not folder.exists()
    assert path.read_text().splitlines()[:6] == whole[:6]  # with LLaVA's numbers: not asked again


@pytest.mark.once
@pytest.mark.long
def test_a_stopped_script_takes_its_processes_along(checkout):
    """SIGTERM in the middle; what was answered until then is kept, and the rest is asked by the next start."""
    folder = checkout / EVAL / "gqa" / "answers" / "llava_gqa_testdev_balanced" / "llava-student" / "merge"
    variables = environment(PYTHON=sys.executable)
    process = subprocess.Popen(command("gqa"), cwd=checkout, env=variables, stdout=-3, stderr=-3)
    until = time.monotonic() + 120
    share = folder / "1_0.jsonl"
    while not (share.is_file() and share.stat().st_size) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (0, 143)  # 0: it was quicker than the signal
    time.sleep(0.5)
    size = share.stat().st_size if share.is_file() else 0
    time.sleep(0.5)
    assert (share.stat().st_size if share.is_file() else 0) == size  # nobody goes on writing
    passed(script(checkout, "gqa"))
    assert len(answers(folder.with_suffix(".jsonl"))) == 61


@pytest.mark.once  # in the other environment it is one of the twelve
def test_textvqa_is_scored_by_llava(checkout, textvqa):
    (accuracy,) = re.findall(r"Samples: \d+\nAccuracy: ([\d.]+)%", textvqa)
    summary = json.loads((checkout / "checkpoints" / "llava-teacher" / "eval" / "textvqa.json").read_text())
    assert summary["value"] == pytest.approx(float(accuracy), abs=0.01) and summary["value"] > 60


@pytest.mark.once
def test_official_scorers_are_called_where_the_user_has_put_them(checkout):
    root = checkout / EVAL
    (root / "gqa" / "data" / "eval.py").write_text("import sys; print('official', sys.argv[1:])")
    assert "official ['--tier', 'testdev_balanced']" in passed(script(checkout, "gqa"))
    # One that fails does not take what is counted from the records along.
    (root / "gqa" / "data" / "eval.py").write_text("import sys; sys.exit('no scene graphs')")
    assert "The scorer failed (status 1)" in passed(script(checkout, "gqa"))
    summary = json.loads((checkout / "checkpoints" / "llava-student" / "eval" / "gqa.json").read_text())
    assert summary["value"] is not None and "The scorer failed" in summary["note"]
    predictions = json.loads((root / "gqa" / "data" / "testdev_balanced_predictions.json").read_text())
    assert {"questionId", "prediction"} == set(predictions[0]) and len(predictions) == 61
    # A relative interpreter, as PYTHON=.venv/bin/python, also serves the steps that run in other folders.
    link = checkout / "python"
    link.write_text(f'#!/bin/sh\nexec "{PYTHON["path"]}" "$@"\n')
    link.chmod(0o755)
    assert "are not in" in passed(script(checkout, "mme", PYTHON="./python"))
    (root / "MME" / "eval_tool").mkdir()
    (root / "MME" / "convert_answer_to_mme.py").write_text("import sys; print('convert', sys.argv[1:])")
    (root / "MME" / "eval_tool" / "calculation.py").write_text("import sys; print('total score: 7.5', sys.argv[1:])")
    printed = passed(script(checkout, "mme", PYTHON="./python"))
    assert "convert ['--experiment', 'llava-student']" in printed
    assert "total score: 7.5 ['--results_dir', 'answers/llava-student']" in printed
    summary = json.loads((checkout / "checkpoints" / "llava-student" / "eval" / "mme.json").read_text())
    assert summary["printed"]["perception"] == 7.5 and "The scorer printed percent" in summary["note"]
    # LLaVA's converters are taken from its repository where they are.
    converter = checkout / "scripts" / "convert_gqa_for_eval.py"
    converter.write_text("import sys; print('LLaVA', sys.argv[1::2])")
    assert "LLaVA ['--src', '--dst']" in passed(script(checkout, "gqa"))
    converter.unlink()


@pytest.mark.once
@pytest.mark.long
def test_an_own_one_is_asked_again_and_under_the_template_of_the_checkpoint(checkout):
    flags = ["--output", "again", "--device", "cpu"]  # by Reefknot's own protocol, generation
    printed = passed(script(checkout, "reefknot", *flags, CONV_MODE=""))
    assert "a second)" in printed
    summary = json.loads((checkout / "again" / "reefknot.json").read_text())
    assert summary["template"] == "qwen_qa" and summary["value"] is not None
    printed = passed(script(checkout, "reefknot", *flags, CONV_MODE="", OVERWRITE="1"))
    assert "a second)" in printed and "answered before" not in printed


@pytest.mark.parametrize("name", registered(EngineBenchmark))
def test_our_own_scripts_differ_in_the_name_alone(name):
    lines = (about.folder("scripts") / "eval" / f"{name}.sh").read_text().splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert code == ['source "$(dirname "${BASH_SOURCE[0]}")/common.sh"', f'own {name} "$@"']


@pytest.fixture(scope="module")
def twelve(checkout, tmp_path_factory) -> tuple[list[str], Path, str]:
    """`llava-compodistill eval` of the student, all benchmarks: the flags, the folder, and what was printed."""
    output = tmp_path_factory.mktemp("twelve") / "student"
    flags = ["eval", "--model-path", "checkpoints/llava-student", "--conv-mode", "qwen_qa", "--device", "cpu"]
    flags += ["--caption-prompt", "Describe the image.", "--output", str(output)]
    return flags, output, evaluate(checkout, flags)


def evaluate(checkout: Path, flags: list[str]) -> str:
    """Run the command in this process, which has imported all it needs; what it and its scripts print."""
    variables = environment(PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile("w+") as printed:
        patch.chdir(checkout)
        for name, value in variables.items():
            patch.setenv(name, value)
        stdout = os.dup(1)
        os.dup2(printed.fileno(), 1)  # where the scripts write
        try:
            with contextlib.redirect_stdout(printed):
                assert main(flags) == 0
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        printed.seek(0)
        return printed.read()


def test_all_twelve_from_one_command_with_the_student(checkout, twelve):
    _, output, printed = twelve
    for name, benchmark in registered().items():
        summary = json.loads((output / f"{name}.json").read_text())
        assert (summary["value"] is None) == (name in ("vqav2", "vizwiz")) and benchmark.title in printed
        assert len((output / f"{name}.jsonl").read_text().splitlines()) == summary["items"]
    assert "CR average" in printed
    # Two are scored by a server, which takes a file.
    assert "No score yet" in printed and "submissions writes the same file" in printed
    written = set(re.findall(r"upload (\S+\.json)", printed))
    assert len(written) == 2 and all(len(json.loads((checkout / path).read_text())) > 4 for path in written)


@pytest.mark.once
@pytest.mark.long
def test_what_was_answered_is_not_asked_again_and_compares_with_itself(checkout, twelve, tmp_path, capfd):
    flags, output, _ = twelve
    before = {path.name: path.read_text() for path in output.glob("*.json")}
    printed = evaluate(checkout, flags)
    assert printed.count("Answered before") == 6 and printed.count("answered before") == 8
    assert {path.name: path.read_text() for path in output.glob("*.json")} == before
    shutil.copytree(output, tmp_path / "twin")
    picture = tmp_path / "comparison.png"
    assert main(["compare", str(output), str(tmp_path / "twin"), "--output", str(picture), "--samples", "200"]) == 0
    printed = capfd.readouterr().out
    assert all(b.title in printed for name, b in registered().items() if name not in ("vqav2", "vizwiz"))
    assert printed.count("+0.0 [0.0, 0.0]") == 12 and picture.stat().st_size > 10_000


@pytest.mark.once
def test_bad_input(checkout, tmp_path):
    def run(*command, **settings):
        return subprocess.run(
            ["bash", *command], cwd=checkout, env={**os.environ, "PYTHON": PYTHON["path"], **settings},
            capture_output=True, text=True,
        )  # fmt: skip

    assert "usage: bash scripts/eval/pope.sh CKPT" in run("scripts/eval/pope.sh").stderr
    assert "EVAL_DATA" in run("scripts/eval/pope.sh", "--help").stdout
    done = run("scripts/eval/pope.sh", "checkpoints/llava-teacher", PYTHON="/bin/false")
    assert done.returncode == 2 and "/bin/false cannot import llava_compodistill: activate" in done.stderr
    done = run("scripts/eval/pope.sh", "checkpoints/nothing")
    assert done.returncode == 2 and "checkpoint not found: checkpoints/nothing" in done.stderr
    done = run("scripts/eval/pope.sh", "checkpoints/llava-teacher", "--overwrite")
    assert done.returncode == 2 and "unknown: --overwrite. Settings" in done.stderr
    lock = checkout / EVAL / "pope" / "answers" / "llava-teacher.jsonl.lock"
    with subprocess.Popen(["flock", str(lock), "sleep", "30"]) as holder:
        until = time.monotonic() + 20
        while subprocess.run(["flock", "-n", str(lock), "true"]).returncode == 0 and time.monotonic() < until:
            time.sleep(0.05)
        done = run("scripts/eval/pope.sh", "checkpoints/llava-teacher", CONV_MODE="qwen_qa")
        holder.terminate()
    assert done.returncode == 2 and "another process is answering" in done.stderr
    done = run("scripts/eval/textvqa.sh", "checkpoints/llava-teacher", EVAL_DATA=str(tmp_path))
    assert done.returncode == 2 and "TextVQA_0.5.1_val.json is missing: see LLaVA's docs/Evaluation.md" in done.stderr
