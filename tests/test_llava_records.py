"""Records and summaries of LLaVA's six: labels found beside the answers, and scores that are those of LLaVA's and the
official scorers."""

from __future__ import annotations

import contextlib
import io
import json
import random

import pytest

from llava_compodistill.errors import DataError, RecordError
from llava_compodistill.eval import scorers
from llava_compodistill.eval.benchmarks import pope, registered, textvqa
from llava_compodistill.eval.benchmarks.llava import LlavaBenchmark, read_accuracy, read_questions
from llava_compodistill.eval.llava_answers import begin, join
from llava_compodistill.eval.llava_suite import main, summarize
from llava_compodistill.eval.records import read_records
from miniature.benchmarks import write_benchmarks

LLAVA_BENCHMARKS = registered(LlavaBenchmark)
LABELLED = [name for name, benchmark in LLAVA_BENCHMARKS.items() if benchmark.score]


@pytest.fixture(scope="module")
def data(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("llava") / "eval"
    write_benchmarks(world["data"], root)
    return root


def sheet(data, name, reply):
    """LLaVA's answers to a benchmark's questions: `reply(label)` each, None for an unknown one."""
    asked = read_questions(data / LLAVA_BENCHMARKS[name].questions)
    blank = [{"question_id": q["question_id"], "prompt": q["text"], "text": ""} for q in asked]
    labels = [label(record) for record in LLAVA_BENCHMARKS[name].records(data, blank)]
    return [{**entry, "text": reply(label)} for entry, label in zip(blank, labels, strict=True)]


def label(record):
    return record.get("label") or (record["answers"][0] if "answers" in record else None)


def inverted(text):
    return {"yes": "No", "no": "Yes"}.get(text.lower(), "nonsense")


@pytest.mark.parametrize("name", LABELLED)
def test_perfect_inverted_and_empty_answers(data, name):
    benchmark = LLAVA_BENCHMARKS[name]

    def value(reply):
        return benchmark.score(LLAVA_BENCHMARKS[name].records(data, sheet(data, name, reply)))

    assert value(lambda text: text)[benchmark.headline] == pytest.approx(100)
    assert value(lambda text: f"{text.capitalize()}.")[benchmark.headline] == pytest.approx(100)
    assert value(inverted)[benchmark.headline] == 0
    found = value(lambda text: " ")
    assert found[benchmark.headline] == 0 and found["unparsable"] == found["items"] > 0


def test_coin_flips_give_chance():
    rng = random.Random(0)
    pairs = [
        {"id": n, "category": "color", "image": str(n // 2), "label": ("yes", "no")[n % 2], "text": flip}
        for n, flip in enumerate(rng.choices(["Yes", "No"], k=8000))
    ]
    found = scorers.mme(pairs)  # half of the questions, a quarter of the images
    assert found["color"] == pytest.approx(75, abs=3) and found["percent"] == pytest.approx(37.5, abs=1.5)
    found = scorers.pope({**pair, "category": ("random", "popular")[n % 4 > 1]} for n, pair in enumerate(pairs))
    assert found["f1"] == pytest.approx(50, abs=2) and found["accuracy"] == pytest.approx(50, abs=2)


def test_pope_by_hand():
    def entry(category, label, text):
        return {"id": f"{category}{label}{text}", "category": category, "label": label, "text": text}

    records = [
        entry("random", "yes", "Yes"),
        entry("random", "yes", "No, there is none"),
        entry("random", "no", "Yes"),
        entry("random", "no", ""),  # wrong, and no yes
        entry("popular", "yes", "There is a dog."),
        entry("popular", "no", "It is not."),
    ]
    found = scorers.pope(records)
    assert (found["f1_random"], found["accuracy_random"]) == (50, 25)
    assert (found["f1_popular"], found["accuracy_popular"]) == (100, 100)
    assert (found["f1"], found["accuracy"]) == (75, 62.5)
    assert found["unparsable"] == 1 and found["items"] == 6 and found["yes_ratio"] == 50


def test_gqa_and_textvqa_by_hand():
    records = [
        {"id": 1, "label": "red", "text": "Red."},
        {"id": 2, "label": "red", "text": "dark red"},
        {"id": 3, "label": "yes", "text": ""},
    ]
    assert scorers.gqa(records) == {"accuracy": pytest.approx(100 / 3), "items": 3, "unparsable": 1}
    records = [{"id": n, "value": value, "text": "x"} for n, value in enumerate((1.0, 0.3, 0.0))]
    assert scorers.textvqa(records)["accuracy"] == pytest.approx(130 / 3)
    assert scorers.gqa([])["accuracy"] is None and scorers.mme([])["percent"] is None
    with pytest.raises(RecordError, match="record 4: has no 'value'"):
        scorers.textvqa([{"id": 4, "text": "x"}])


def test_mme_by_hand():
    def entry(task, image, label, text):
        return {"id": f"{task}{image}{label}", "category": task, "image": image, "label": label, "text": text}

    records = [
        *(entry("color", "1", "yes", "Yes"), entry("color", "1", "no", "No.")),  # both
        *(entry("color", "2", "yes", "yes, it is"), entry("color", "2", "no", "Yes")),  # one
        *(entry("OCR", "1", "yes", "Maybe"), entry("OCR", "1", "no", "no")),  # one: neither yes nor no is wrong
        *(entry("code_reasoning", "1", "yes", ""), entry("code_reasoning", "1", "no", "yes")),  # none
    ]
    found = scorers.mme(records)
    assert found["color"] == 75 + 50 and found["OCR"] == 50 and found["code_reasoning"] == 0
    assert found["perception"] == 175 and found["cognition"] == 0
    assert found["percent"] == pytest.approx(100 * 175 / 400) and found["unparsable"] == 2
    with pytest.raises(RecordError, match="category 'colour' must be one of existence"):
        scorers.mme([{"id": 1, "category": "colour"}])


def answered(data, name, entries, output):
    """The files that the scripts leave: answers and what made them."""
    questions = data / LLAVA_BENCHMARKS[name].questions
    answers = output / f"{name}-answers.jsonl"
    begin(questions, answers, {"model": "m", "weights": "", "template": "v1"})
    part = answers.with_suffix("") / "1_0.jsonl"
    part.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    join(questions, answers)
    return answers


def noisy(rng):
    return lambda text: rng.choice([text, text.capitalize(), inverted(text), "The answer is not there.", "perhaps"])


def test_figures_are_those_that_llavas_scorers_print(data, tmp_path):
    from llava.eval import eval_pope, eval_textvqa

    entries = sheet(data, "pope", noisy(random.Random(3)))
    printed = io.StringIO()
    questions = read_questions(data / "pope" / "llava_pope_test.jsonl")
    with contextlib.redirect_stdout(printed):
        for path in sorted((data / "pope" / "coco").iterdir()):
            category = path.name[len("coco_pope_") : -len(".json")]
            mine = [dict(e) for e, q in zip(entries, questions, strict=True) if q["category"] == category]
            print(f"Category: {category}, # samples: {len(mine)}")
            eval_pope.eval_pope(mine, str(path))
    summary = summarize("pope", answered(data, "pope", entries, tmp_path), data, tmp_path / "out", printed.getvalue())
    assert summary["printed"] == pytest.approx(
        {key: summary["figures"][key] for key in pope.read_printed(printed.getvalue())}
    )
    assert "printed" not in summary["note"] and 0 < summary["value"] < 100

    entries = sheet(data, "textvqa", noisy(random.Random(4)))
    answers = answered(data, "textvqa", entries, tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        eval_textvqa.eval_single(str(data / "textvqa" / "TextVQA_0.5.1_val.json"), str(answers))
    summary = summarize("textvqa", answers, data, tmp_path / "out", printed.getvalue())
    assert summary["value"] == pytest.approx(read_accuracy(printed.getvalue())["accuracy"], abs=0.01)
    assert "printed" not in summary["note"] and 0 < summary["value"] < 100


def test_an_empty_answer_that_pope_takes_for_a_yes_is_wrong_here_and_said(data, tmp_path):
    answers = answered(data, "pope", sheet(data, "pope", lambda text: ""), tmp_path)
    printed = "Category: random, # samples: 4\nAccuracy: 0.5\nF1 score: 0.667\nYes ratio: 1.0\n"
    summary = summarize("pope", answers, data, tmp_path, printed)
    assert summary["value"] == 0 and summary["figures"]["empty"] == summary["items"]
    # What the scorer prints is held against the reading that is the authors'.
    assert summary["readings"]["official"]["value"] == pytest.approx(200 / 3) and "printed" not in summary["note"]
    wrong = summarize("pope", answers, data, tmp_path, printed.replace("0.667", "0.5"))
    assert "printed f1 50.00; counted from the records it is 66.67" in wrong["note"]
    assert f"{summary['items']} answers are empty or cannot be read, and count as wrong" in summary["note"]


@pytest.mark.parametrize(
    ("text", "strict", "official"), [("", 0, 1), (" ", 0, 1), ("A", 1, 1), ("the", 1, 1), ("b", 0, 0)]
)
def test_a_blank_answer_is_never_right(tmp_path, text, strict, official):
    """LLaVA's processor takes articles away on both sides: where ten people answered "a", nothing is right to it."""
    folder = tmp_path / "textvqa"
    folder.mkdir()
    labels = {"data": [{"image_id": "i", "question": "Which letter?", "answers": ["a"] * 10}]}
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps(labels))
    records = textvqa.records(tmp_path, [{"question_id": "i", "prompt": "Which letter?\nShort.", "text": text}])
    assert textvqa.score(records)["accuracy"] == 100 * strict
    assert textvqa.score(records, textvqa.OFFICIAL)["accuracy"] == 100 * official
    assert float(textvqa.sums(records).headline()) == 100 * strict


def test_a_scorer_that_fails_is_no_end_where_records_count(data, world, tmp_path, monkeypatch, capsys):
    answers = answered(data, "gqa", sheet(data, "gqa", lambda text: text), tmp_path)
    flags = ["gqa", "--answers", str(answers), "--output", str(tmp_path / "out")]
    said = "The scorer failed (status 1), see above; what is counted from the records stands.\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    assert main([*flags, "--data-root", str(data)]) == 0
    assert "GQA: The scorer failed" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    assert main([*flags, "--data-root", str(tmp_path)]) == 1  # no labels there


def test_without_labels_there_are_records_and_a_note(data, tmp_path):
    answers = answered(data, "vizwiz", sheet(data, "vizwiz", lambda text: "red"), tmp_path)
    summary = summarize("vizwiz", answers, data, tmp_path, "No score yet: upload\nx.json.\n")
    assert summary["value"] is None and summary["note"] == "No score yet: upload x.json."
    records = read_records(tmp_path / "vizwiz.jsonl")
    assert len(records) == summary["items"] and {record["text"] for record in records} == {"red"}
    assert json.loads((tmp_path / "vizwiz.json").read_text()) == summary


def test_labels_that_are_elsewhere(world, tmp_path):
    write_benchmarks(world["data"], tmp_path)
    gqa = tmp_path / "gqa" / "data"
    entries = sheet(tmp_path, "gqa", lambda text: text)
    answers = answered(tmp_path, "gqa", entries, tmp_path)
    (gqa / "questions1.2").mkdir()
    (gqa / "testdev_balanced_questions.json").rename(gqa / "questions1.2" / "testdev_balanced_questions.json")
    assert summarize("gqa", answers, tmp_path, tmp_path)["value"] == 100
    (gqa / "questions1.2" / "testdev_balanced_questions.json").unlink()
    summary = summarize("gqa", answers, tmp_path, tmp_path)
    assert summary["value"] is None and "neither the official scorer nor" in summary["note"]
    # What the official scorer prints counts where there are no labels.
    assert summarize("gqa", answers, tmp_path, tmp_path, "Binary: 1%\nAccuracy: 61.90%\n")["value"] == 61.9
    # MME's labels lie with the pictures, with or without folders between.
    folder = tmp_path / "MME" / "MME_Benchmark_release_version" / "position"
    for path in (folder / "questions_answers_YN").iterdir():
        path.rename(folder / path.name)
    answers = answered(tmp_path, "mme", sheet(tmp_path, "mme", lambda text: text), tmp_path)
    assert summarize("mme", answers, tmp_path, tmp_path)["figures"]["position"] == 200


def test_labels_that_do_not_fit_are_named(world, tmp_path):
    write_benchmarks(world["data"], tmp_path)

    def refused(name, message):
        entries = [
            {"question_id": q["question_id"], "prompt": q["text"], "text": "x"}
            for q in read_questions(tmp_path / LLAVA_BENCHMARKS[name].questions)
        ]
        with pytest.raises(DataError, match=message):
            LLAVA_BENCHMARKS[name].records(tmp_path, entries)

    path = tmp_path / "pope" / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text() + '{"label": "no"}\n')
    refused("pope", r"coco_pope_random.json: \d+ labels for \d+ questions")
    path.write_text("no\n")
    refused("pope", "coco_pope_random.json, line 1: no JSON")
    path.write_text("{}\n")
    refused("pope", "coco_pope_random.json, line 1: has no 'label'")
    path.unlink()
    refused("pope", "coco_pope_random.json is missing: it has the labels of the category 'random'")
    (tmp_path / "gqa" / "data" / "testdev_balanced_questions.json").write_text("{}")
    refused("gqa", "has no answer to question 0")
    (tmp_path / "textvqa" / "TextVQA_0.5.1_val.json").write_text('{"data": []}')
    refused("textvqa", "has no answers to .* on image image0")
    (tmp_path / "textvqa" / "TextVQA_0.5.1_val.json").write_text("{}")
    refused("textvqa", "must hold data:")
    first = next(iter(sorted((tmp_path / "MME").glob("*/position/questions_answers_YN/*.txt"))))
    first.write_text("Is it?\tYes\n")
    refused("mme", f"{first.name}: has no question 'Is the")
    first.write_text("Is it? Yes\n")
    refused("mme", f"{first.name}, line 1: must be a question, a tab")
    first.unlink()
    refused("mme", f"{first.name} is missing")


def test_the_scripts_end_shows_what_the_scorer_prints_and_the_table(data, tmp_path, monkeypatch, capsys):
    answers = answered(data, "gqa", sheet(data, "gqa", lambda text: text), tmp_path)
    flags = ["gqa", "--answers", str(answers), "--data-root", str(data), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.stdin", io.StringIO("Accuracy: 12.00%\n"))
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Accuracy: 12.00%\n") and "62.1" in printed and "100.0" in printed
    assert "The scorer printed accuracy 12.00" in " ".join(printed.split())
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main([*flags, "--table", "0"]) == 0 and capsys.readouterr().out == ""
    answers.write_text("nonsense\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(flags) == 2 and "line 1: no JSON" in capsys.readouterr().err
