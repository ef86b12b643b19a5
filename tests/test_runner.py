"""`llava-compodistill run`: LLaVA's modules as __main__, and cuda and float16 redirected where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from llava_compodistill import cli
from llava_compodistill.hosts.llava import runner

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is redirected on a machine with CUDA")

# As llava.eval.model_vqa_loader does it: a module global that the workers read, inputs sent to cuda in half precision.
SCRIPT = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
from llava.conversation import conv_templates


class Data(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.tensor([index * args])


if __name__ == "__main__":
    args = int(sys.argv[1])
    model = torch.nn.Linear(1, 1).half().cuda()
    for batch in DataLoader(Data(), num_workers=4):
        x = batch.to(device="cuda", non_blocking=True)
        y = model(x.to(dtype=torch.float16, device="cuda"))
    torch.cuda.synchronize()
    print("last", int(x), y.dtype, y.device, "qwen_1_5" in conv_templates)
"""


@no_cuda
@pytest.mark.slow
def test_a_module_with_hard_coded_cuda_and_workers_runs(tmp_path: Path):
    (tmp_path / "evaluation.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "llava_compodistill.cli", "run", "evaluation", "7"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "last 35 torch.float32 cpu True"
    assert result.stderr.count("no CUDA device") == 1


def test_a_missing_module_is_named(capsys):
    assert cli.main(["run", "llava.eval.no_such_module"]) == 2
    error = capsys.readouterr().err
    assert "no module 'llava.eval.no_such_module'" in error and "llava.eval.model_vqa_loader" in error


def test_a_file_name_in_place_of_a_module_gets_a_hint():
    with pytest.raises(runner.RunnerError, match="Did you mean llava.eval.model_vqa"):
        runner.check_module("llava/eval/model_vqa.py")


def test_a_missing_dependency_of_the_package_is_not_called_a_missing_module(tmp_path, monkeypatch):
    (tmp_path / "outer_package").mkdir()
    (tmp_path / "outer_package" / "__init__.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "outer_package" / "inner.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(runner.RunnerError, match="needs the package a_package_that_is_not_there"):
        runner.check_module("outer_package.inner")


def test_help_needs_no_module(capsys):
    assert runner.main(["--help"]) == 0
    assert runner.main([]) == 2
    assert "usage: llava-compodistill run" in capsys.readouterr().out


@no_cuda
def test_requests_for_cuda_and_half_precision_are_redirected():
    x = torch.arange(3.0)
    with runner.redirect_cuda():
        results = [
            x.cuda(),
            x.half(),
            x.half().cuda(),
            x.to("cuda"),
            x.to("cuda:1", torch.float16),
            x.to(torch.device("cuda", 0), non_blocking=True),
            x.to(dtype=torch.float16),
            x.to(device=torch.device("cuda")),
            x.type(torch.float16),
            x.type("torch.cuda.HalfTensor"),
            torch.tensor([0.0, 1.0, 2.0], device="cuda", dtype=torch.float16),
            torch.as_tensor([0.0, 1.0, 2.0], device="cuda"),
            torch.arange(3, device="cuda", dtype=torch.half),
        ]
        assert torch.zeros_like(x, device="cuda").device.type == "cpu"
        assert x.to(torch.bfloat16).dtype is torch.bfloat16
        assert torch.ones(2, dtype=torch.long).cuda().dtype is torch.long
        torch.cuda.synchronize()
    for result in results:
        assert result.device.type == "cpu" and result.dtype is torch.float32
        assert torch.equal(result, x)


@no_cuda
def test_weights_that_are_half_precision_already_become_single_on_the_way_to_cuda():
    weights = torch.ones(2, dtype=torch.float16)
    model = nn.Linear(2, 2).half()
    with runner.redirect_cuda():
        assert weights.cuda().dtype is torch.float32
        assert weights.to("cuda").dtype is torch.float32
        assert next(model.to("cuda").parameters()).dtype is torch.float32


@no_cuda
def test_files_of_half_precision_are_read_as_what_they_are(tmp_path):
    """safetensors gives bytes their dtype by name: read as float32 there would be half as many numbers."""
    from safetensors.torch import load_file, save_file

    weights = {"a": torch.arange(6, dtype=torch.float16).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "w.safetensors")
    with runner.redirect_cuda():
        found = load_file(tmp_path / "w.safetensors")
        again = torch.frombuffer(bytearray(8), dtype=torch.float16)
    assert torch.equal(found["a"].float(), weights["a"].float()) and torch.equal(found["b"], weights["b"])
    assert again.shape == (4,)


@no_cuda
def test_the_redirection_ends_with_its_context():
    synchronize = torch.cuda.synchronize
    with pytest.raises(ZeroDivisionError), runner.redirect_cuda():
        assert torch.cuda.synchronize is not synchronize
        raise ZeroDivisionError
    assert torch.cuda.synchronize is synchronize
    assert torch.ones(2).half().dtype is torch.float16
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2).to("cuda")


def test_what_a_module_wrote_before_a_kill_is_on_the_disk(tmp_path):
    """LLaVA's eval modules never flush; a kill would take the last lines along."""
    (tmp_path / "asks.py").write_text(
        "import os\n"
        "file = open('answers.jsonl', 'w')\n"
        "binary = open('weights.bin', 'wb')\n"
        "for number in range(3):\n"
        "    file.write(f'answer {number}\\n')\n"
        "file.write('half')\n"
        "assert open('answers.jsonl').read() and open('answers.jsonl', encoding='utf-8')\n"
        "os._exit(9)\n"
    )
    command = [sys.executable, "-m", "llava_compodistill.cli", "run", "asks"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 9
    assert (tmp_path / "answers.jsonl").read_text() == "answer 0\nanswer 1\nanswer 2\n"


def test_a_wrong_template_is_said_before_the_module_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "never.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "never", "--conv-mode", "qwen_q"]) == 2
    assert "'qwen_q' is no conversation template" in capsys.readouterr().err
