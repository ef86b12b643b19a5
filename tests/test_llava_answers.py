"""Around LLaVA's model_vqa_loader: what is left to ask, how answers are joined, and the files for the servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_compodistill.errors import RecordsError
from llava_compodistill.eval import submissions
from llava_compodistill.eval.llava_answers import begin, join, main, shares

pytestmark = pytest.mark.once  # nothing here depends on transformers

ABOUT = {"model": "student", "template": "qwen_1_5"}
#: An id may repeat with another text, and a question with its text may stand there twice.
ASKED = [
    ("a.png", "Is it red?"),
    ("a.png", "Is it blue?"),
    ("b.png", "How many?"),
    ("b.png", "How many?"),
    (7, "Why?"),
]


def lines(path: Path, entries: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def answer(number: int, text: str = "") -> dict:
    """An answer of LLaVA's to question `number`."""
    key, prompt = ASKED[number]
    return {"question_id": key, "prompt": prompt, "text": text or f"answer {number}", "answer_id": number}


@pytest.fixture
def questions(tmp_path) -> Path:
    return lines(tmp_path / "q.jsonl", [{"question_id": k, "image": "x.png", "text": t} for k, t in ASKED])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shares_are_joined_in_the_order_of_the_questions(questions, tmp_path):
    answers = tmp_path / "answers" / "student.jsonl"
    assert begin(questions, answers, ABOUT) == 5
    assert len(read(tmp_path / "answers" / "student" / "left.jsonl")) == 5
    lines(tmp_path / "answers" / "student" / "2_1.jsonl", [answer(3, "second"), answer(4)])
    lines(tmp_path / "answers" / "student" / "2_0.jsonl", [answer(0), answer(1), answer(2, "first")])
    assert join(questions, answers) == 5
    assert [entry["text"] for entry in read(answers)] == ["answer 0", "answer 1", "first", "second", "answer 4"]
    assert sorted(path.name for path in answers.parent.iterdir()) == ["student.jsonl", "student.jsonl.run.json"]
    assert begin(questions, answers, ABOUT) == 0  # answered before
    assert begin(questions, answers, ABOUT, overwrite=True) == 5 and not answers.exists()


def test_after_a_kill_only_what_is_left_is_asked(questions, tmp_path):
    answers, folder = tmp_path / "student.jsonl", tmp_path / "student"
    begin(questions, answers, ABOUT)
    path = lines(folder / "2_0.jsonl", [answer(0), answer(1)])
    path.write_text(path.read_text() + json.dumps(answer(2))[:30])  # in the middle of a line
    lines(folder / "2_1.jsonl", [answer(3)])
    assert begin(questions, answers, ABOUT) == 2  # one of the two that are alike, and the last
    assert [entry["text"] for entry in read(folder / "left.jsonl")] == ["How many?", "Why?"]
    assert sorted(path.name for path in folder.iterdir()) == ["kept.jsonl", "left.jsonl"]
    with pytest.raises(RecordsError, match="2 of 5 questions have no answer"):
        join(questions, answers)
    lines(folder / "3_0.jsonl", [answer(2), answer(0)])  # the second is kept already: a kill came while it was moved
    assert begin(questions, answers, ABOUT) == 1  # killed again, with another number of GPUs
    lines(folder / "1_0.jsonl", [answer(4)])
    assert begin(questions, answers, ABOUT) == 0 and not answers.exists()  # killed before they were joined
    assert join(questions, answers) == 5 and [entry["prompt"] for entry in read(answers)] == [t for _, t in ASKED]


def test_answers_of_another_run_or_other_questions_are_named_and_kept(questions, tmp_path):
    answers, folder = tmp_path / "student.jsonl", tmp_path / "student"
    begin(questions, answers, ABOUT)
    part = lines(folder / "1_0.jsonl", [answer(0)])
    with pytest.raises(RecordsError, match="template 'qwen_1_5', not 'v1'.*OVERWRITE=1"):
        begin(questions, answers, {**ABOUT, "template": "v1"})
    other = lines(tmp_path / "other.jsonl", [{"question_id": "a.png", "image": "x.png", "text": "Is it green?"}])
    with pytest.raises(RecordsError, match=r"1_0.jsonl, line 1: question 'a.png' with this text is not in .*other"):
        begin(other, answers, ABOUT)
    assert read(part) == [answer(0)]
    lines(part, [answer(0), {**answer(0), "answer_id": "another"}])
    with pytest.raises(RecordsError, match="line 2: question 'a.png' is answered once more"):
        begin(questions, answers, ABOUT)
    part.write_text("nonsense\n")
    with pytest.raises(RecordsError, match="1_0.jsonl, line 1: no JSON"):
        begin(questions, answers, ABOUT)
    lines(part, [{"question_id": 7, "text": "x"}])
    with pytest.raises(RecordsError, match="line 1: has no 'prompt', only question_id, text"):
        begin(questions, answers, ABOUT)
    lines(part, [answer(0)])
    (tmp_path / "student.jsonl.run.json").unlink()  # as LLaVA's own scripts leave them
    with pytest.raises(RecordsError, match="which says what made these records, is missing"):
        begin(questions, answers, ABOUT)


def test_wrong_questions_are_named(tmp_path):
    with pytest.raises(RecordsError, match="none.jsonl: No such file"):
        begin(tmp_path / "none.jsonl", tmp_path / "a.jsonl", ABOUT)
    path = lines(tmp_path / "q.jsonl", [{"question_id": 1, "image": "x.png", "question": "Why?"}])
    with pytest.raises(RecordsError, match="q.jsonl, line 1: has no 'text', only question_id, image, question"):
        begin(path, tmp_path / "a.jsonl", ABOUT)
    path.write_text('{"question_id": 1, "image": "x.png", "text": "a"}\n{"question_id": 2, "image"')
    with pytest.raises(RecordsError, match="q.jsonl, line 2: no JSON"):
        begin(path, tmp_path / "a.jsonl", ABOUT)
    path.write_text('{"question_id": 1, "image": "x.png", "text": "a"}\n{"question_id": 2, "image": "y", "text": "b"}')
    assert begin(path, tmp_path / "a.jsonl", ABOUT) == 2  # without a line break at the end
    (tmp_path / "x.png").touch()
    with pytest.raises(RecordsError, match=r"q.jsonl, line 2: its image .*y is missing"):
        begin(path, tmp_path / "b.jsonl", ABOUT, images=tmp_path)
    path.write_text("")
    with pytest.raises(RecordsError, match="holds no questions"):
        begin(path, tmp_path / "a.jsonl", ABOUT)


def test_there_are_as_many_shares_as_llava_can_cut():
    from llava.eval.model_vqa_loader import get_chunk

    for left in (1, 2, 5, 9, 10, 11, 100):
        for gpus in (1, 2, 3, 8):
            count = shares(left, gpus)
            assert 1 <= count <= gpus
            parts = [get_chunk(list(range(left)), count, number) for number in range(count)]
            assert sum(parts, []) == list(range(left))
    assert shares(0, 8) == 0


def test_the_command_prints_what_the_script_reads(questions, tmp_path, capsys):
    flags = ["--questions", str(questions), "--answers", str(tmp_path / "a.jsonl"), "--gpus", "4"]
    assert main(["begin", *flags, "--template", "v1"]) == 0
    assert capsys.readouterr().out == "5 3 v1\n"
    (tmp_path / "model").mkdir()
    assert main(["begin", *flags, "--model", str(tmp_path / "model")]) == 2
    assert "does not tell the model's type" in capsys.readouterr().err
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava_mistral"}')
    assert main(["begin", *flags, "--model", str(tmp_path / "model"), "--overwrite", "1"]) == 0
    assert capsys.readouterr().out == "5 3 mistral_instruct\n"
    assert main(["join", *flags]) == 2
    assert "5 of 5 questions have no answer" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Submissions
# ---------------------------------------------------------------------------------------------------------------------
def submission_case(root: Path) -> dict[str, tuple[str, list[str], Path]]:
    """Files for the three converters: name -> (script's name, flags, what is written)."""
    asked = [{"question_id": number, "image": f"{number}.jpg", "text": "?"} for number in range(6)]
    texts = ["Two dogs.", "A cat", "the Don't", "1,000", "", "yes"]
    given = [{"question_id": n, "prompt": "?", "text": text} for n, text in enumerate(texts)]
    lines(root / "test.jsonl", asked)
    lines(root / "llava_vqav2_mscoco_test2015.jsonl", asked)
    lines(root / "answers.jsonl", given)
    lines(root / "answers" / "dev" / "m" / "merge.jsonl", given[:4])
    upload = root / "answers_upload" / "v.json"
    return {
        "gqa": ("gqa_for_eval", ["--src", f"{root}/answers.jsonl", "--dst", f"{root}/gqa.json"], root / "gqa.json"),
        "vizwiz": (
            "vizwiz_for_submission",
            [
                *("--annotation-file", f"{root}/test.jsonl", "--result-file", f"{root}/answers.jsonl"),
                *("--result-upload-file", str(upload)),
            ],
            upload,
        ),
        "vqav2": (
            "vqav2_for_submission",
            ["--dir", str(root), "--split", "dev", "--ckpt", "m"],
            root / "answers_upload" / "dev" / "m.json",
        ),
    }


def test_submissions_by_hand(tmp_path):
    made = {}
    for name, (command, flags, path) in submission_case(tmp_path).items():
        assert submissions.main([command, *flags]) == 0
        made[name] = json.loads(path.read_text())
    assert made["gqa"][:2] == [
        {"questionId": 0, "prediction": "two dogs"},
        {"questionId": 1, "prediction": "a cat"},
    ]
    clean = ["2 dogs", "cat", "don't", "1000", "", "yes"]  # numbers in digits, no articles, no punctuation
    assert made["vizwiz"] == [{"image": f"{n}.jpg", "answer": text} for n, text in enumerate(clean)]
    # Of the test split only test-dev is asked; the server wants a line for all of it.
    assert made["vqav2"] == [{"question_id": n, "answer": text} for n, text in enumerate([*clean[:4], "", ""])]


def test_a_submission_with_questions_left_is_refused(tmp_path, capsys):
    command, flags, path = submission_case(tmp_path)["vizwiz"]
    lines(tmp_path / "answers.jsonl", [{"question_id": 0, "prompt": "?", "text": "x"}])
    assert submissions.main([command, *flags]) == 2 and not path.exists()
    assert "has no answer to question 1" in capsys.readouterr().err


@pytest.mark.skipif("LLAVA_CHECKOUT" not in os.environ, reason="LLAVA_CHECKOUT names no git checkout of LLaVA")
@pytest.mark.parametrize("name", ["gqa", "vizwiz", "vqav2"])
def test_submissions_are_those_of_llavas_scripts(tmp_path, name):
    command, flags, path = submission_case(tmp_path)[name]
    submissions.main([command, *flags])
    ours = json.loads(path.read_text())
    path.unlink()
    script = Path(os.environ["LLAVA_CHECKOUT"]) / "scripts" / f"convert_{command}.py"
    subprocess.run([sys.executable, str(script), *flags], check=True, capture_output=True)
    assert json.loads(path.read_text()) == ours
