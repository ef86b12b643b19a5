"""Files that people and other programs write, in every way that they can be wrong: each is one clear error."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from llava_compodistill.analysis.samples import read_samples
from llava_compodistill.cli import main
from llava_compodistill.errors import CheckpointError, CompoDistillError, DataError, RecordError, RecordsError
from llava_compodistill.eval.benchmarks import files as benchmark_files
from llava_compodistill.eval.benchmarks import registered
from llava_compodistill.eval.benchmarks.llava import read_answers, read_questions
from llava_compodistill.eval.checkpoint import check_checkpoint, template_of
from llava_compodistill.eval.compare import compare
from llava_compodistill.eval.records import RecordFile, check_run, read_records, scoring, write_run
from llava_compodistill.eval.sade_sources import read_entries
from llava_compodistill.eval.summaries import read_summary
from llava_compodistill.hosts.files import parse_json, read_object, read_yaml
from llava_compodistill.hosts.llava.loader import checkpoint_kind, read_config, read_lora_config
from llava_compodistill.reproduce.grid import finished
from llava_compodistill.reproduce.tuning import read_tuning
from llava_compodistill.reproduce.worldfile import read_world_file
from llava_compodistill.train.calibration import read_calibration
from llava_compodistill.train.mix import read_sources
from llava_compodistill.train.records import Records
from miniature.benchmarks import write_benchmarks

pytestmark = pytest.mark.once  # nothing here depends on transformers

#: What may stand in a file; None is a folder in its place.
CONTENTS = {
    "empty": b"",
    "no UTF-8": b'{"a": "\xff\xfe"}\n',
    "nested without end": b"[" * 100_000 + b"\n",
    "a number of 5,000 digits": b'{"id": "1", "benchmark": ' + b"1" * 5000 + b"}\n",
    "a list of a number": b"[3]\n",
    "a text": b'"text"\n',
    "cut off": b'{"a": [1,\n',
    "folder": None,
}
#: What JSON does not have, and Python reads.
LOOSE = {"NaN": b'{"id": "1", "model_type": "llava_qwen2", "a": NaN}\n', "twice": b'{"id": "1", "id": "2"}\n'}


def config_of(read):
    """A reader of a folder's config.json."""
    return "config.json", lambda path: read(str(path.parent))


READERS = {
    "JSON": ("a.json", read_object),
    "summary": ("pope.json", read_summary),
    "records": ("a.jsonl", read_records),
    "records to go on with": ("a.jsonl", lambda path: begun(path)),
    "what made records": ("a.jsonl.run.json", lambda path: check_run(path.parent / "a.jsonl", {"model": "x"}, "")),
    "questions": ("a.jsonl", read_questions),
    "answers": ("a.jsonl", read_answers),
    "benchmark, JSON": ("a.json", lambda path: benchmark_files.read_object(path, "see there.")),
    "benchmark, lines": ("a.jsonl", lambda path: list(benchmark_files.read_lines(path, "see there."))),
    "SADE, JSON": ("a.json", read_entries),
    "SADE, lines": ("a.jsonl", read_entries),
    "analysis, lines": ("a.jsonl", lambda path: read_samples(str(path))),
    "analysis, JSON": ("a.json", lambda path: read_samples(str(path))),
    "world, JSON": ("a.json", read_world_file),
    "world, YAML": ("a.yaml", read_world_file),
    "tuning": ("tuning.json", lambda path: read_tuning(path.parent)),
    "run": ("run.json", lambda path: finished(path.parent)),
    "calibration": ("calibration.json", lambda path: read_calibration(str(path.parent), {})),
    "mix": ("a.yaml", lambda path: read_sources(str(path))),
    "kind of a checkpoint": config_of(checkpoint_kind),
    "config": config_of(read_config),
    "checkpoint to evaluate": config_of(check_checkpoint),
    "template": config_of(template_of),
    "LoRA": ("adapter_config.json", lambda path: read_lora_config(str(path.parent))),
    "training data": ("a.json", lambda path: Records(str(path), "", "error")),
}
#: What is no error to a reader: an empty file, a folder in the place of one that need not be there, and entries that
#: whoever asked for them looks at himself.
FINE = {
    "world, YAML": {"empty"}, "answers": {"empty"}, "records": {"empty"}, "records to go on with": {"empty"},
    "benchmark, lines": {"empty"}, "benchmark, JSON": {"a list of a number"},
    "SADE, lines": {"empty", "a list of a number", "a text"}, "SADE, JSON": {"a list of a number"},
    "tuning": {"folder"}, "run": {"folder"}, "calibration": {"folder"},
}  # fmt: skip


def begun(path):
    write_run(path, {})
    with RecordFile(path, {}, ["1"]) as records:
        return records.done


def look(reader, tmp_path, content):
    """What a reader gives of a file with a content."""
    name, read = READERS[reader]
    path = tmp_path / name
    (tmp_path / "model.safetensors").write_bytes(b"")  # for kinds of checkpoints
    path.write_bytes(content) if content is not None else path.mkdir()
    return read(path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_reader_names_the_file(tmp_path, reader, kind):
    if kind in FINE.get(reader, ()):
        look(reader, tmp_path, CONTENTS[kind])
        return
    with pytest.raises(CompoDistillError) as caught:
        look(reader, tmp_path, CONTENTS[kind])
    name = READERS[reader][0].removesuffix(".run.json")
    assert re.search(rf"{re.escape(name)}|{re.escape(str(tmp_path))} has no config.json", str(caught.value))


@pytest.mark.parametrize("reader", sorted(set(READERS) - {"training data", "world, YAML", "mix"}))
@pytest.mark.parametrize("kind", LOOSE)
def test_what_is_no_json_is_refused(tmp_path, reader, kind):
    with pytest.raises(CompoDistillError) as caught:
        look(reader, tmp_path, LOOSE[kind])
    message = {"NaN": "NaN is no number of JSON", "twice": "the name 'id' stands twice"}[kind]
    assert message in str(caught.value) or reader == "what made records"


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "1"}\n{"id": "2"}\n')
    assert [record["id"] for record in read_records(tmp_path / "a.jsonl")] == ["1", "2"]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfid,b\n1,2\n")
    assert read_entries(tmp_path / "a.csv")[0][1] == {"id": "1", "b": "2"}


@pytest.mark.parametrize(
    "text, message", [
        ("a: 1\na: 2\n", "the name 'a' stands twice"), ("a: [1,\n", "not valid YAML"), ("{[1]: 2}", "not valid YAML"),
        ("a: 2020-99-99\n", "not valid YAML"), ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)  # fmt: skip
def test_yaml_is_read_strictly(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(DataError, match=f"(?s)a.yaml: .*{message}"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("x: &x {a: 1, b: 2}\ny:\n  <<: *x\n  a: 3\n")
    assert read_yaml(tmp_path / "a.yaml")["y"] == {"a": 3, "b": 2}


def test_a_place_in_the_text_is_told():
    with pytest.raises(DataError, match=r"f: no JSON \(Expecting value, line 2, column 3\)"):
        parse_json('{"a":\n  }', "f")


def test_fields_of_a_csv_file_have_a_longest(tmp_path):
    (tmp_path / "a.csv").write_text(f"a\n{'x' * 200_000}\n")
    with pytest.raises(DataError, match=r"a\.csv: cannot be read \(field larger"):
        read_entries(tmp_path / "a.csv")


# ---------------------------------------------------------------------------------------------------------------------
# Values of the wrong kind
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "values, message", [
        ({"model_type": 5}, "model_type must be a text, is 5"),
        ({"model_type": "llava_qwen2", "num_hidden_layers": "many"}, "config.json"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_model(tmp_path, values, message):
    from llava_compodistill.hosts.llava import register

    register()
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        read_config(str(tmp_path))


SUMMARY = {"benchmark": "pope", "headline": "f1", "protocol": "LLaVA's", "model": "m", "fingerprint": "f", "items": 1}
SUMMARY |= {"figures": {"f1": 1.0}, "value": 1.0, "pins": {}}


@pytest.mark.parametrize(
    "changes, message", [
        ({"items": "one"}, "its 'items' is 'one'"), ({"value": "high"}, "its 'value' is 'high'"),
        ({"figures": []}, "its 'figures' is"), ({"fingerprint": None}, "its 'fingerprint' is None"),
        ({"pins": [1]}, "its 'pins' are"), ({"headline": ...}, "it has no 'headline'"),
    ],
)  # fmt: skip
def test_a_summary_that_is_none(tmp_path, changes, message):
    values = {name: value for name, value in {**SUMMARY, **changes}.items() if value is not ...}
    (tmp_path / "pope.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=f"pope.json: no summary .*{message}"):
        read_summary(tmp_path / "pope.json")


def test_a_summary_of_an_unknown_benchmark_is_named_with_its_file(tmp_path):
    (tmp_path / "pope.json").write_text(json.dumps({**SUMMARY, "benchmark": "human"}))
    for read in (read_summary, lambda path: compare([path], samples=10)):
        with pytest.raises(DataError, match=r"pope\.json: benchmark 'human': there are sugarcrepe, "):
            read(tmp_path / "pope.json")


@pytest.mark.parametrize(
    "record", [{"id": "1"}, {"id": "1", "category": "random", "label": 3, "text": "yes"}, {"id": "1", "label": "yes",
     "category": "random", "text": 7}, {"id": ["1"]}, 3],
)  # fmt: skip
def test_records_of_something_else(tmp_path, record):
    (tmp_path / "pope.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "pope.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises((DataError, RecordsError), match=r"pope\.json"):
        compare([tmp_path / "pope.json"], samples=10)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question_id": 1, "prompt": 7, "text": "yes"}, "line 2: prompt must be a text, is 7"),
        ({"question_id": 1, "prompt": "Why?", "text": ["yes"]}, "line 2: text must be a text, is .'yes'."),
        ({"question_id": [1], "prompt": "Why?", "text": "yes"}, "line 2: question_id must be a text or a number"),
    ],
)
def test_answers_that_are_none(tmp_path, line, message):
    good = {"question_id": 1, "prompt": "Why?", "text": ""}
    (tmp_path / "answers.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(line)}\n")
    with pytest.raises(RecordsError, match=rf"answers\.jsonl, {message}"):
        read_answers(tmp_path / "answers.jsonl")


def test_an_error_of_a_scorer_names_the_file_of_records(tmp_path):
    for error, message in (
        (RecordError("record 8: label"), "record 8: label"),
        (TypeError("a list"), "TypeError: a l"),
    ):
        with pytest.raises(RecordsError, match=rf"two\.jsonl: .*{message}"), scoring(tmp_path / "two.jsonl", "POPE"):
            raise error
    with pytest.raises(DataError, match="^as it was$"), scoring(tmp_path / "two.jsonl", "POPE"):
        raise DataError("as it was")


def test_a_method_option_that_is_no_json():
    from llava_compodistill.train.arguments import _read_method

    for text, message in (("{", "no JSON"), ("[" * 100_000, "nested too deeply"), ('{"a": NaN}', "NaN")):
        with pytest.raises(ValueError, match=f"--method_options .*{message}"):
            _read_method("llava_kd", text)


# ---------------------------------------------------------------------------------------------------------------------
# Labels of LLaVA's benchmarks, before anything is asked
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def benchmarks(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile") / "eval"
    write_benchmarks(world["data"], root)
    return root


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def first_of_mme(root):
    return sorted((root / "MME" / "MME_Benchmark_release_version").glob("**/*.txt"))[0]


GQA, TEXTVQA = "gqa/data/testdev_balanced_questions.json", "textvqa/TextVQA_0.5.1_val.json"
LABELS = {
    "gqa without one": ("gqa", lambda root: change(root / GQA, dict.popitem), "has no answer to question"),
    "gqa with a number": (
        "gqa", lambda root: change(root / GQA, lambda c: [e.update(answer=1) for e in c.values()]), "has no answer",
    ),
    "gqa, a list": ("gqa", lambda root: (root / GQA).write_text("[]"), "has no answer to question"),
    "gqa, cut off": ("gqa", lambda root: (root / GQA).write_text("{"), "no JSON"),
    "mme without one": (
        "mme", lambda root: first_of_mme(root).unlink(), r"the labels of an image of MME \(.*llava_mme\.jsonl",
    ),
    "mme, another question": (
        "mme", lambda root: first_of_mme(root).write_text("Why?\tYes\n"), r"which .*/MME/llava_mme\.jsonl asks",
    ),
    "mme, another answer": ("mme", lambda root: first_of_mme(root).write_text("Why?\tPerhaps\n"), "line 1: must be"),
    "textvqa, nine answers": (
        "textvqa", lambda root: change(root / TEXTVQA, lambda c: [e["answers"].pop() for e in c["data"]]),
        "must have ten answers",
    ),
    "textvqa without one": (
        "textvqa", lambda root: change(root / TEXTVQA, lambda c: c["data"].clear()), "has no answers to",
    ),
    "textvqa without data": ("textvqa", lambda root: (root / TEXTVQA).write_text("[]"), "must hold data"),
    "pope, perhaps": (
        "pope", lambda root: [path.write_text(path.read_text().replace('"yes"', '"perhaps"'))
                              for path in (root / "pope" / "coco").glob("*.json")], "must be yes or no",
    ),
}  # fmt: skip


def test_answers_that_are_too_few_or_to_other_questions(benchmarks):
    asked = read_questions(benchmarks / "pope" / "llava_pope_test.jsonl")
    answers = [{"question_id": entry["question_id"], "prompt": entry["text"], "text": "Yes"} for entry in asked]
    assert len(registered()["pope"].records(benchmarks, answers)) == len(asked)
    for some in (answers[:-1], [*answers, answers[0]], []):
        with pytest.raises(DataError, match=rf"llava_pope_test\.jsonl has {len(asked)} questions, .* {len(some)} ans"):
            registered()["pope"].records(benchmarks, some)


def test_a_prompt_that_is_not_worded_as_llavas(benchmarks):
    asked = [{"question_id": 1, "prompt": "Why?", "text": "so"}]
    with pytest.raises(DataError, match=r"textvqa/.*: the question on image 1 is not worded as LLaVA's, is 'Why\?'"):
        registered()["textvqa"].records(benchmarks, asked)


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_looked_at_before_anything_is_asked(benchmarks, tmp_path, kind):
    name, damage, message = LABELS[kind]
    registered()[name].check(benchmarks)
    shutil.copytree(benchmarks, tmp_path / "eval", symlinks=True)
    damage(tmp_path / "eval")
    with pytest.raises(DataError, match=message):
        registered()[name].check(tmp_path / "eval")


def test_a_name_that_the_screen_cannot_show_is_no_end(benchmarks, tmp_path, capsys):
    shutil.copytree(benchmarks, tmp_path / "eval", symlinks=True)
    path = tmp_path / "eval" / "pope" / "llava_pope_test.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    entries[0]["image"] = "half\ud800.png"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert main(["eval", "--check", "--data-root", str(tmp_path / "eval"), "--benchmarks", "pope,sade"]) == 1
    assert r"half\ud800.png is missing" in " ".join(capsys.readouterr().out.split())
