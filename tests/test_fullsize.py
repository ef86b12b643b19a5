"""`reproduce --preset gpu`: the world file, the stages that rows share, devices, and a table of tiny models."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from test_reproduce import in_this_process

from llava_compodistill.cli import main
from llava_compodistill.errors import DataError
from llava_compodistill.reproduce import cli, fullsize, grid, stages
from llava_compodistill.reproduce.devices import Devices, Stopped, device_sets
from llava_compodistill.reproduce.fullsize import FullSizeWorld
from llava_compodistill.reproduce.recipes import COMPODISTILL, KD, SFT, Recipe
from llava_compodistill.reproduce.runner import StageFailed, run_script
from llava_compodistill.reproduce.studies import STUDIES, Row, Study
from llava_compodistill.reproduce.worldfile import DEFAULTS, read_world_file
from miniature.benchmarks import write_benchmarks

pytestmark = pytest.mark.once  # the stages themselves are tested in both environments


def write(path: Path, **entries) -> Path:
    path.write_text(yaml.safe_dump(entries))
    return path


@pytest.fixture
def make(tmp_path):
    """A world on the CPU with the paper's choices and these entries."""

    def make_world(**entries):
        file = read_world_file(write(tmp_path / "world.yaml", device="cpu", **entries))
        return FullSizeWorld(file, tmp_path / "out")

    return make_world


# ---------------------------------------------------------------------------------------------------------------------
# The world file
# ---------------------------------------------------------------------------------------------------------------------
def test_a_world_file_fills_in_what_it_does_not_say(tmp_path):
    plain = read_world_file(None)
    assert plain.students["default"] == "Qwen/Qwen1.5-1.8B" and plain.teachers == DEFAULTS["teachers"]
    path = write(tmp_path / "w.yaml", teachers={"llama": "./l"}, templates={"llama": "v1"}, data={"images": "/i"})
    found = read_world_file(path)
    assert found.teachers == {**DEFAULTS["teachers"], "llama": "./l"} and found.data["images"] == "/i"
    assert found.data["instruct"] == plain.data["instruct"]
    assert (found.template("llama"), found.template("small")) == ("v1", "qwen_1_5")
    as_json = tmp_path / "w.json"
    as_json.write_text(json.dumps({"environment": {"BATCH": 2}, "samples": {"cr": None}, "flags": ["--max_steps", 2]}))
    found = read_world_file(as_json)
    assert found.environment == {"BATCH": "2"} and found.samples["cr"] is None and found.flags == ("--max_steps", "2")


def test_the_readme_shows_every_entry_with_its_default(tmp_path):
    text = (Path(fullsize.__file__).parent / "README.md").read_text()
    path = tmp_path / "w.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    assert yaml.safe_load(path.read_text()).keys() == DEFAULTS.keys()
    shown, plain = read_world_file(path), read_world_file(None)
    assert replace(shown, path=None, samples={**shown.samples, "images": ""}) == plain


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"teacher": "x"}, "unknown entry teacher; there are students, teachers"),
        ({"data": {"image": "x"}}, "unknown data.image; there are pretrain"),
        ({"data": {"instruct": None}}, "data.instruct is empty; leave it out for ./playground"),
        ({"teachers": "x"}, "teachers must be a mapping of names to values, is 'x'"),
        ({"teachers": {"default": None}}, "teachers has no `default`"),
        ({"teachers": {"large": ["x"]}}, r"teachers.large must be a single value, is \['x'\]"),
        ({"device": "gpu"}, "device must be cuda or cpu, is 'gpu'"),
        ({"gpus_per_run": 0}, "gpus_per_run must be a number of 1 or more, is 0"),
        ({"lora": "yes please"}, "lora must be true or false, is 'yes please'"),
        ({"benchmarks": "gqa"}, "benchmarks must be a list, is 'gqa'"),
        ({"tower": 3}, "tower must be a text, is 3"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, entries, message):
    with pytest.raises(DataError, match=message):
        read_world_file(write(tmp_path / "w.yaml", **entries))


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    assert main(["reproduce", "table2", "--preset", "gpu", "--world", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: there is no such file" in capsys.readouterr().err
    path = tmp_path / "w.yaml"
    for text, message in (("a: [", "not valid YAML"), ("- a", "must hold entries such as students")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_world_file(path)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and stages
# ---------------------------------------------------------------------------------------------------------------------
def test_rows_are_the_papers(make, tmp_path):
    """What stands for something else in the miniature is the paper's own here."""
    world = make()
    rows = {
        name: {key: world.normal(row.recipe) for key, row in study.rows.items() if row.recipe}
        for name, study in STUDIES.items()
    }
    usual = [
        ("table3b", "intermediate"),
        ("table3c", "group"),
        ("table5", "half"),
        ("table6", "small"),
        ("vat", "all"),
    ]
    for table, row in usual:
        assert rows[table][row] == COMPODISTILL, (table, row)
    assert rows["table3c"]["simple"] == replace(COMPODISTILL, flags=("--layer_matching", "simple"))
    assert rows["table5"]["whole"] == rows["table9"]["scaled"] == replace(COMPODISTILL, mix="scaled")
    assert rows["table5"]["sft"] == SFT
    pairs = {key: (recipe.student, recipe.teacher) for key, recipe in rows["table6"].items()}
    assert pairs["large"] == ("default", "large") and pairs["small_small"] == ("small", "small")
    assert pairs["small_large"] == ("small", "default"), "0.5B from 4B"


def test_rows_share_their_first_stages(make):
    world = make(environment={"LORA_R": 8})

    def keys(recipe, seed=0, of=world):
        return [stage.key for stage in of.plan(of.normal(recipe), seed)]

    full = keys(COMPODISTILL)
    no_vat = keys(replace(COMPODISTILL, vat=False))
    assert full[0] == no_vat[0] and full[1] != no_vat[1] and full[2] != no_vat[2]
    assert keys(replace(COMPODISTILL, stages=("dpt", "dft"))) == full[:2]
    assert keys(SFT)[0] == keys(Recipe(method="llavadi", stages=("pt", "dft"), projector="mlp2x_gelu", vat=False))[0]
    assert keys(KD)[0] != full[0], "another adapter"
    assert keys(COMPODISTILL, 1)[0] != full[0], "another seed"
    assert keys(COMPODISTILL, of=make(environment={"BATCH": 8, "WORKERS": 1, "SAVE_STEPS": 1})) == full
    assert keys(COMPODISTILL, of=make(environment={"GLOBAL_BATCH": 64}))[0] != full[0]
    changed = keys(COMPODISTILL, of=make(environment={"PRECISION": "fp16"}))
    assert not set(changed) & set(full)
    lora = make(lora=True).plan(COMPODISTILL, 0)
    assert [stage.output.name.endswith("-lora") for stage in lora] == [False, True, True] and lora[0].key == full[0]
    assert all("llava" in stage.output.name for stage in lora), "as LLaVA's tools know a checkpoint"


def test_sft_with_a_teacher_is_another_stage_for_another_teacher(make):
    """Without one, teachers share it."""

    def sft(environment, teacher):
        flags = ["--teacher_model_path", teacher] if environment else []
        settings = {"DFT": "./dft", "TEACHER": teacher, **environment}
        return stages.plan("sft.sh", settings, flags, make().root, 1).key

    aligned = {"ATTENTION_STAGES": "dft,sft"}
    assert sft({}, "./one") == sft({}, "./two")
    assert len({sft({}, "./one"), sft(aligned, "./one"), sft(aligned, "./two")}) == 3


def test_the_scripts_get_the_papers_settings(make):
    dpt, dft, sft = make().plan(COMPODISTILL, 3)
    assert [stage.script for stage in (dpt, dft, sft)] == ["dpt.sh", "dft.sh", "sft.sh"]
    # Table 8 and Appendix E.1.
    for stage, batch, rate in ((dpt, "256", "1e-3"), (dft, "128", "1e-4"), (sft, "128", "1e-4")):
        command = stage.command
        assert (command["global_batch"], command["learning_rate"], command["num_train_epochs"]) == (batch, rate, "1")
        assert command["seed"] == command["data_seed"] == "3" and command["model_max_length"] == "2048"
    assert dft.command["pretrain_mm_mlp_adapter"] == str(dpt.output / "mm_projector.bin")
    assert sft.command["model_name_or_path"] == str(dft.output) and dft.command["version"] == "qwen_1_5"
    changed = make().plan(replace(COMPODISTILL, rate=2e-5, steps=0.5), 3)
    found = [(stage.command["learning_rate"], stage.command["num_train_epochs"]) for stage in changed]
    assert found == [("1e-3", "1"), ("2e-05", "0.5"), ("2e-05", "0.5")]


def test_the_data_behind_a_path_count(make, tmp_path):
    data = tmp_path / "data.json"
    records = [{"conversations": [{"value": "x"}]}] * 300
    data.write_text(json.dumps(records))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(records[:100]))
    mix = write(tmp_path / "mix.yaml", datasets=[str(data), {"path": str(other), "weight": 0.5}])
    stages.count_samples.cache_clear()
    entries = {"pretrain": str(data), "instruct": str(data), "scaled": str(mix)}
    world = make(data=entries)
    assert world.steps(COMPODISTILL) == 2 + 3 + 3, "300 samples in batches of 256 and 128"
    assert world.steps(replace(COMPODISTILL, mix="doubled")) == 2 + 3 + 3, "350"
    half = world.plan(replace(COMPODISTILL, data=0.5), 0)[1]
    assert yaml.safe_load(Path(half.command["data_path"]).read_text())["datasets"][0]["weight"] == 0.5
    assert make(data=entries, flags=["--max_steps", 7]).steps(COMPODISTILL) == 21
    key = world.plan(COMPODISTILL, 0)[1].key
    data.write_text(json.dumps(records[:200]))
    assert world.plan(COMPODISTILL, 0)[1].key != key
    assert make().steps(COMPODISTILL) is None, "no data here"


# ---------------------------------------------------------------------------------------------------------------------
# Training each stage once
# ---------------------------------------------------------------------------------------------------------------------
class FakeScripts:
    """Leaves what a stage leaves; fails at a stage when told to, after a checkpoint."""

    def __init__(self):
        self.ran, self.fails, self.at_once, self.most = [], None, 0, 0

    def __call__(self, name, environment, flags, log, threads, on_log):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        time.sleep(0.02)
        output = Path(environment["OUTPUT"])
        (output / "checkpoint-3").mkdir(parents=True, exist_ok=True)
        self.at_once -= 1
        self.ran.append((name, output.name, environment["CUDA_VISIBLE_DEVICES"]))
        if name == self.fails:
            raise StageFailed(f"{name} ended with status 1")
        (output / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
        return 2.0


@pytest.fixture
def fake(monkeypatch):
    scripts = FakeScripts()
    monkeypatch.setattr(fullsize, "run_script", scripts)
    monkeypatch.setattr(FullSizeWorld, "evaluate", lambda self, checkpoint, teacher="default": {"cr": 1.0})
    monkeypatch.setattr(FullSizeWorld, "prepare", lambda self, recipes=(): None)
    return scripts


def train(world, recipes, seeds=(0,), jobs=1):
    return grid.train_grid(world, recipes, seeds, world.root / "runs", jobs, Console(quiet=True), world.ahead)


def test_a_killed_grid_goes_on_with_the_stage_that_it_was_at(make, fake):
    world = make()
    fake.fails = "dft.sh"
    with pytest.raises(StageFailed):
        train(world, [COMPODISTILL])
    assert [name for name, *_ in fake.ran] == ["dpt.sh", "dft.sh"]
    fake.fails, fake.ran = None, []
    again = FullSizeWorld(world.file, world.root)
    found = train(again, [COMPODISTILL])
    assert [name for name, *_ in fake.ran] == ["dft.sh", "sft.sh"]
    record = found[COMPODISTILL.key, 0]
    assert record["steps"] == 9 and record["seconds"] == 6.0 and record["world"]["student"] == "Qwen/Qwen1.5-1.8B"
    output = Path(record["checkpoint"])
    assert output.parent == world.root / "stages" and not list(output.glob("checkpoint-*")), "no optimizer states"
    fake.ran = []
    assert train(again, [COMPODISTILL]) == found and not fake.ran


def test_a_shared_stage_is_trained_once_by_runs_at_once(make, fake, monkeypatch):
    monkeypatch.setattr(fullsize, "device_sets", lambda device, each: ["0,1", "2,3"])
    world = make()
    rows = [COMPODISTILL, replace(COMPODISTILL, vat=False), replace(COMPODISTILL, stages=("dpt", "dft"))]
    found = train(world, rows, (0, 1), world.jobs)
    names = [name for _, name, _ in fake.ran]
    assert len(names) == len(set(names)) == 2 * (1 + 2 + 2), "DPT, two DFT and two SFT a seed"
    assert fake.most <= 2 == world.jobs and {devices for *_, devices in fake.ran} == {"0,1", "2,3"}
    assert sum(record["seconds"] for record in found.values()) == 2.0 * len(names), "each stage is counted once"
    assert world.plan(COMPODISTILL, 0)[0].command["gradient_accumulation_steps"] == "8", (
        "two processes: 256 / (2 x 16)"
    )


def test_a_failure_begins_nothing_more(make, fake):
    """Runs that are begun ahead wait for the device, and must not train for hours after the failure."""
    world = make()
    fake.fails = "dpt.sh"
    with pytest.raises(StageFailed, match="dpt.sh ended"):
        train(world, [COMPODISTILL, KD, SFT])
    assert len(fake.ran) == 1 and not (world.root / "runs").exists()
    with pytest.raises(Stopped), world.devices.borrow():
        pass


def test_runs_with_other_models_are_other_runs(make):
    folders = {
        grid.run_folder(Path("runs"), world, COMPODISTILL, 0)
        for world in (make(), make(teachers={"default": "./other"}), make(tower="t"), make(benchmarks=["sugarcrepe"]))
    }
    assert len(folders) == 4
    same = make(teachers={"large": "./large"}, environment={"BATCH": 2}, gpus_per_run=1)
    assert grid.run_folder(Path("runs"), same, COMPODISTILL, 0) in folders


# ---------------------------------------------------------------------------------------------------------------------
# Devices
# ---------------------------------------------------------------------------------------------------------------------
def test_devices_are_lent_by_priority():
    lent, order = Devices(["0"]), []
    started = threading.Barrier(4)

    def work(priority):
        started.wait()
        with lent.borrow(priority) as (number, names):
            order.append((priority, number, names))

    with lent.borrow((9,)):
        threads = [threading.Thread(target=work, args=(p,)) for p in ((1, 0), (0, -1), (0, -2))]
        for thread in threads:
            thread.start()
        started.wait()
        while len(lent._waiting) < 3:
            time.sleep(0.001)
    for thread in threads:
        thread.join(5)
    assert order == [((0, -2), 0, "0"), ((0, -1), 0, "0"), ((1, 0), 0, "0")]
    with lent.borrow() as (number, _):
        assert number == 0, "given back"
    with pytest.raises(KeyError), lent.borrow():
        raise KeyError
    with pytest.raises(Stopped), lent.borrow():
        pass


def test_gpus_are_divided_into_sets(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_sets("cuda", 2) == ["0,1", "2,3"], "one is left over"
    assert device_sets("cuda", None) == ["0,1,2,3,4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7,9")
    assert device_sets("cuda", 1) == ["3", "5", "6", "7", "9"]
    with pytest.raises(DataError, match=r"gpus_per_run 6: there are only 5 GPUs here \(3, 5, 6, 7, 9\)"):
        device_sets("cuda", 6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DataError, match="no CUDA device here. `device: cpu`"):
        device_sets("cuda", 1)
    assert device_sets("cpu", 4) == ["-1"]


def test_trainings_beside_each_other_have_ports_of_their_own(make):
    world = make()
    assert world._on(0, "3") == {"CUDA_VISIBLE_DEVICES": "3", "NPROC": "1"}
    assert world._on(2, "4,5")["LAUNCHER_ARGS"] == "--master_port 29502"


def test_the_log_of_a_failing_script_is_shown(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(StageFailed, match=r"dpt.sh ended with status 2; the end of .*\n.*The teacher not found"):
        run_script("dpt.sh", {"TEACHER": "./none/none/none"}, [], log, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Before any work
# ---------------------------------------------------------------------------------------------------------------------
def test_what_is_missing_is_named_with_its_entry(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world = make(benchmarks=["gqa", "sade", "nlvr"], tower="./tower", students={"small": "./student"})
    with pytest.raises(DataError) as error:
        world.prepare([COMPODISTILL, replace(SFT, student="small")])
    text = str(error.value)
    for part in (
        "checkpoint not found: ./checkpoints/llava-qwen1.5-4b [teachers.default]. teacher_pretrain.sh and",
        "there is no folder ./tower [tower].",
        "there is no folder ./student [students.small].",
        "there is no file ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json [data.pretrain].",
        "there is no folder ./playground/data [data.images].",
        "playground/data/eval/gqa/llava_gqa_testdev_balanced.jsonl is missing: see LLaVA's docs/Evaluation.md",
        "the images of sade are in none of",
        "benchmark 'nlvr': there are sugarcrepe",
        "[samples.cr]. null leaves similarity out",
    ):
        assert part in text, part
    assert "students.default" not in text, "a name on the hub"


def test_no_gpu_is_no_reason_to_refuse_a_list(tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    command = ["reproduce", "table3a", "--preset", "gpu"]
    assert main([*command, "--list"]) == 0
    assert "dpt dft sft" in capsys.readouterr().out
    assert main(command) == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_rows_whose_models_are_not_named_are_left_out(tmp_path, capsys):
    path = write(tmp_path / "w.yaml", device="cpu", students={"llama": "a/llama"})
    command = ["reproduce", "--preset", "gpu", "--world", str(path), "--output", str(tmp_path / "out")]
    assert main([*command, "table7"]) == 2
    text = capsys.readouterr().out
    assert f"table7 needs teachers.llama (Table 7, MobileLLaMA-2.7B) in {path}; left out: CompoDistill, Llama." in text
    assert main([*command, "table6", "table9", "figure2", "--list"]) == 0
    text = capsys.readouterr().out
    assert "table6 needs teachers.large (Table 6, Qwen2.5-7B)" in text and "table9 needs data.scaled" in text
    assert "figure2 needs samples.vqa (a benchmark or a file" in text


def test_a_world_file_is_for_full_size_models(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["table2", "--world", "w.yaml"])
    assert "--preset cpu makes its own models and data" in capsys.readouterr().err


def test_the_appendix_has_the_same_rows(capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])  # where the miniature is
    assert main(["reproduce", "table10", "table3a", "--preset", "smoke", "--list"]) == 0
    text = capsys.readouterr().out
    assert text.count("table3a") == 4 and "12" in text


# ---------------------------------------------------------------------------------------------------------------------
# A table of tiny models
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.long
def test_a_table_of_tiny_models(world, teacher_path, tmp_path, monkeypatch, capsys):
    """Two rows, which share two stages, through the real scripts, evaluation and analysis; then nothing is left."""
    data = tmp_path / "eval"
    write_benchmarks(world["data"], data)
    images = str(world["data"] / "images")
    path = write(
        tmp_path / "world.yaml",
        students={"default": str(world["qwen-student"])},
        teachers={"default": str(teacher_path)},
        tower=str(world["siglip"]),
        data={
            "pretrain": str(world["data"] / "pretrain.json"),
            "instruct": str(world["data"] / "instruct_student.json"),
            "pretrain_images": images, "images": images, "eval": str(data),
        },
        benchmarks=["sugarcrepe"], samples={"limit": 8}, device="cpu", flags=["--max_steps", "2"],
        environment={"BATCH": 2, "GLOBAL_BATCH": 4, "MAX_LENGTH": 512, "WORKERS": 0, "GRADIENT_CHECKPOINTING": False},
    )  # fmt: skip
    rows = {"full": Row("whole", COMPODISTILL), "4": Row("without SFT", replace(COMPODISTILL, stages=("dpt", "dft")))}
    monkeypatch.setattr(cli, "STUDIES", {"tiny": Study("tiny", "Table 0: two", {"teacher": Row("T", None), **rows})})
    scripts, commands = [], []

    def script(name, environment, *rest):
        assert environment["NPROC"] == "1" and environment["CUDA_VISIBLE_DEVICES"] == "-1"
        scripts.append(name)
        return in_this_process(name, environment, *rest)

    def command(arguments, environment, log):
        commands.append(arguments[0])
        assert main(list(arguments)) == 0
        return 1.0

    monkeypatch.setattr(fullsize, "run_script", script)
    monkeypatch.setattr(fullsize, "run_command", command)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    flags = ["reproduce", "tiny", "--preset", "gpu", "--world", str(path), "--output", str(tmp_path / "out")]
    assert main([*flags, "--seeds", "4"]) == 0
    assert scripts == ["dpt.sh", "dft.sh", "sft.sh"] and sorted(commands) == ["analyze"] * 2 + ["eval"] * 3
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| row | CR: sugarcrepe | similarity | seeds |" in report and "| T | " in report
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert {run["steps"] for run in runs} == {4, 6}
    for run in runs:
        assert run["scores"]["cr"] == run["scores"]["benchmarks"]["sugarcrepe"] and "vqa" not in run["scores"]
        assert -1 <= run["scores"]["similarity"] <= 1 and len(run["scores"]["similarity_by_layer"]) == 4
    capsys.readouterr()
    assert main([*flags, "--seeds", "4", "--list"]) == 0
    assert capsys.readouterr().out.split()[-1] == "4"
    assert main([*flags, "--seeds", "4"]) == 0 and len(scripts) == 3 and len(commands) == 5
