"""A benchmark from outside the package, one file: asked, resumed, scored, shown and compared by the real commands."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from llava_compodistill.cli import main
from llava_compodistill.errors import DataError
from llava_compodistill.eval import benchmarks
from miniature import weights

pytestmark = pytest.mark.skipif(not weights.have_stored_weights(), reason="no stored weights")
#: Asked in a way of its own: which of the words would the answer begin with?
PICK = """
from llava_compodistill.eval.benchmarks import figures, register
from llava_compodistill.eval.benchmarks.base import EngineBenchmark
from llava_compodistill.eval.benchmarks.sums import mean_of_means
from llava_compodistill.eval.requests import FirstWord

from colors import load

WORDS = ("Red", "Blue", "Green", "Yellow")


def record(item, protocol, responses):
    return {"id": item.id, **item.fields, "protocol": protocol, "logits": responses[0]}


def right(record):
    return float(WORDS[record["logits"].index(max(record["logits"]))] == record["label"])


register(
    EngineBenchmark(
        name="pick",
        title="Pick",
        headline="accuracy",
        load=load,
        protocols=("first-word",),
        requests=lambda item, protocol, caption_prompt: [FirstWord(item.images[0], item.prompt, WORDS)],
        record=record,
        score=lambda records: {"accuracy": figures.percent(map(right, records))},
        sums=lambda records: mean_of_means(records, right),
        how_to_get="with the other one.",
    )
)
"""


def example() -> str:
    """The file of the README."""
    readme = Path(benchmarks.__file__).with_name("README.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A folder with the modules and their data; the registry is left as it was."""
    ours = benchmarks.registered()
    monkeypatch.setattr(benchmarks, "_registry", dict(ours))
    (tmp_path / "colors.py").write_text(example())
    (tmp_path / "pick.py").write_text(PICK)
    folder = tmp_path / "data" / "colors"
    folder.mkdir(parents=True)
    (folder / "images").symlink_to(world["data"] / "images")
    asked = [json.loads(line) for line in (world["data"] / "recognition_val.jsonl").read_text().splitlines()]
    asked = [entry for entry in asked if entry["answer"] in ("Red", "Blue", "Green", "Yellow")]
    assert len(asked) >= 5
    rows = [{"id": n, **{key: e[key] for key in ("image", "text")}, "label": e["answer"]} for n, e in enumerate(asked)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights.install(tmp_path / "models")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("colors", "pick"):
        sys.modules.pop(name, None)


def flags(place, model, output):
    common = ["--data-root", str(place / "data"), "--conv-mode", "qwen_qa", "--device", "cpu"]
    return ["eval", "--model-path", str(model), *common, "--output", str(place / output)]


def test_a_benchmark_from_outside_goes_all_the_way(place, teacher_path, monkeypatch, capsys):
    monkeypatch.setenv("COMPODISTILL_BENCHMARKS", "colors, pick")
    teacher = place / "models" / "llava-teacher"
    assert main([*flags(place, teacher, "teacher"), "--benchmarks", "colors,pick"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Colors +accuracy +answer", printed) and re.search(r"Pick +accuracy +first-word", printed)
    for name in ("colors", "pick"):
        summary = json.loads((place / "teacher" / f"{name}.json").read_text())
        records = [json.loads(line) for line in (place / "teacher" / f"{name}.jsonl").read_text().splitlines()]
        assert summary["value"] > 40 and summary["items"] == len(records) and summary["paper"] == {}
    # A run that was killed goes on; of `all`, what is not there is left out.
    path = place / "teacher" / "colors.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-2]))
    assert main(flags(place, teacher, "teacher")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("left out:") == 14 and "answered before" in printed and "a second)" in printed
    assert main([*flags(place, teacher_path, "untrained"), "--benchmarks", "colors,pick"]) == 0
    picture = place / "comparison.png"
    both = [str(place / "untrained"), str(place / "teacher")]
    assert main(["compare", *both, "--samples", "500", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "Colors" in printed and "Pick" in printed and picture.stat().st_size > 5000
    monkeypatch.delenv("COMPODISTILL_BENCHMARKS")
    del benchmarks._registry["colors"], benchmarks._registry["pick"]
    assert main(["compare", str(place / "teacher" / "colors.json")]) == 2
    assert "benchmark 'colors': there are sugarcrepe" in capsys.readouterr().err


def test_missing_files_and_wrong_fields_of_such_a_benchmark(place, monkeypatch, capsys):
    monkeypatch.setenv("COMPODISTILL_BENCHMARKS", "colors")
    command = [*flags(place, place / "models" / "llava-teacher", "out"), "--benchmarks", "colors"]
    questions = place / "data" / "colors" / "questions.jsonl"
    questions.write_text('{"id": 1, "image": "x.png", "text": "?"}\n')
    assert main(command) == 2
    assert "questions.jsonl, line 1: has no 'label'" in " ".join(capsys.readouterr().out.split())
    questions.unlink()
    assert main(command) == 2
    assert "questions.jsonl is missing: it is at example.org/colors." in " ".join(capsys.readouterr().out.split())


def test_what_the_registry_refuses(place, monkeypatch, capsys):
    monkeypatch.setenv("COMPODISTILL_BENCHMARKS", "no_such_module")
    assert main(["eval", "--model-path", "x"]) == 2
    assert "COMPODISTILL_BENCHMARKS: no_such_module cannot be imported" in capsys.readouterr().err
    monkeypatch.setenv("COMPODISTILL_BENCHMARKS", "colors")
    colors = benchmarks.get("colors")
    assert benchmarks.register(colors) is colors and list(benchmarks.registered())[-1] == "colors"
    with pytest.raises(DataError, match="benchmark 'colors': there is another one of this name"):
        benchmarks.register(type(colors)(name="colors", title="", headline="", load=colors.load, protocols=()))
    with pytest.raises(DataError, match="benchmark 'My Colors': its name must be of small letters"):
        benchmarks.register(type(colors)(name="My Colors", title="", headline="", load=colors.load, protocols=()))
    with pytest.raises(DataError, match="benchmark 'colours': there are sugarcrepe, .*, pope, colors; COMPODISTILL"):
        benchmarks.get("colours")


def test_the_registry_has_them_in_the_order_of_the_tables():
    names = [name for name in benchmarks.registered() if name in benchmarks.ORDER]
    assert tuple(names) == benchmarks.ORDER
    for benchmark in map(benchmarks.get, names):
        assert (benchmark.score is None) == (benchmark.sums is None)
