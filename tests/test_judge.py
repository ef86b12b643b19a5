"""A judge of open answers: a small classifier that is made here, whose every logit is known."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from llava_compodistill.cli import main
from llava_compodistill.errors import DataError
from llava_compodistill.eval.judge import check_judge, judge
from miniature import weights
from miniature.benchmarks import write_benchmarks

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "man", "rides", "is", "on", "a", "horse", "sits", "dog"]
#: (id, answer, label)
ASKED = [
    ("1", "the man rides a horse", "the man is on a horse"),
    ("2", "the man is on a horse", "the man rides a horse"),
    ("3", "a dog sits", "the man rides a horse"),
    ("4", " ", "the man rides a horse"),
    ("5", "the man rides", "the man rides a horse and more of it"),
]


@pytest.fixture
def nli(tmp_path):
    """A classifier's folder. With random weights its three classes are about equally frequent."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    folder = tmp_path / "nli"
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(3)
    labels = {0: "CONTRADICTION", 1: "ENTAILMENT", 2: "NEUTRAL"}
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        id2label=labels, label2id={name: number for number, name in labels.items()}, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def entails(folder, first, second):
    """One pair at a time, unpadded, in double precision."""
    model = BertForSequenceClassification.from_pretrained(folder).double().eval()
    batch = BertTokenizerFast.from_pretrained(folder)(first, second, return_tensors="pt")
    with torch.no_grad():
        return int(model(**batch).logits[0].argmax()) == 1


def test_both_directions_have_to_be_entailment(nli, tmp_path):
    found = judge(str(nli), ASKED, tmp_path / "r.judge.jsonl", "cpu")
    expected = {
        key: bool(answer.strip()) and entails(nli, answer, label) and entails(nli, label, answer)
        for key, answer, label in ASKED
    }
    assert found.by_id == expected and expected["4"] is False
    one_way = {key: entails(nli, answer, label) for key, answer, label in ASKED}
    assert set(one_way.values()) == {True, False} and one_way != expected  # or this would show little
    assert (
        found.judge["judge"] == "nli"
        and len(found.judge["weights"]) == 16
        and "entailment both" in found.judge["rule"]
    )
    assert found.of("1") == {"verdict": expected["1"]} and found.of("6") == {}


def test_verdicts_are_kept_and_made_anew_for_another_judge_or_other_answers(nli, tmp_path):
    path, counted = tmp_path / "r.judge.jsonl", []
    first = judge(str(nli), ASKED, path, "cpu", counted.append)
    assert sum(counted) == 4  # an empty answer needs no judge
    assert judge(str(nli), ASKED, path, "cpu", counted.append) == first and sum(counted) == 4
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")  # a kill
    assert judge(str(nli), ASKED, path, "cpu", counted.append).by_id == first.by_id and sum(counted) == 6
    judge(str(nli), [("1", "the dog", "a dog"), *ASKED[1:]], path, "cpu", counted.append)
    assert sum(counted) == 10 and len(path.read_text().splitlines()) == 5
    config = json.loads((nli / "config.json").read_text())
    (nli / "config.json").write_text(json.dumps(config | {"attention_probs_dropout_prob": 0.3}))
    judge(str(nli), [("1", "the dog", "a dog"), *ASKED[1:]], path, "cpu", counted.append)
    assert sum(counted) == 14


def test_what_is_no_judge_is_refused(nli, tmp_path):
    assert check_judge(str(nli)) == (1, "")
    with pytest.raises(DataError, match="--judge .*nothing: no folder or name of a model"):
        check_judge(str(tmp_path / "nothing"))
    config = json.loads((nli / "config.json").read_text())
    (nli / "config.json").write_text(json.dumps(config | {"id2label": {"0": "good", "1": "not_entailment"}}))
    with pytest.raises(DataError, match="its classes are good, not_entailment; .*called entailment"):
        check_judge(str(nli))


@pytest.mark.skipif(not weights.have_stored_weights(), reason="no stored weights")
@pytest.mark.long
def test_the_command_with_and_without_a_judge(nli, world, tmp_path, capsys):
    write_benchmarks(world["data"], tmp_path / "data")
    weights.install(tmp_path / "models")
    flags = ["eval", "--model-path", str(tmp_path / "models" / "llava-teacher"), "--data-root", str(tmp_path / "data")]
    flags += [
        "--conv-mode",
        "qwen_qa",
        "--device",
        "cpu",
        "--benchmarks",
        "reefknot",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(flags) == 0
    assert "rscore  " not in capsys.readouterr().out  # no row of the table
    plain = json.loads((tmp_path / "out" / "reefknot.json").read_text())
    assert "rscore" not in plain["figures"] and plain["judge"] is None
    assert "No judge was given" in plain["note"]
    assert main([*flags, "--judge", str(nli)]) == 0
    printed = capsys.readouterr().out
    assert "rscore" in printed and "by the judge nli, which is not the authors'" in " ".join(printed.split())
    judged = json.loads((tmp_path / "out" / "reefknot.json").read_text())
    verdicts = [json.loads(line) for line in (tmp_path / "out" / "reefknot.judge.jsonl").read_text().splitlines()]
    right = 100 * sum(entry["verdict"] for entry in verdicts) / len(verdicts)
    figures = judged["figures"]
    assert figures["vqa"]["accuracy"] == pytest.approx(right)
    tasks = [figures[task]["accuracy"] for task in ("yesno", "multichoice", "vqa")]
    assert figures["rscore"] == pytest.approx(sum(tasks) / 3) and judged["value"] == plain["value"]
    assert judged["judge"]["judge"] == "nli" and len(verdicts) == figures["vqa"]["items"]
    # With a process a device: each answers its share, and the answers are judged once, together.
    assert main([*flags, "--judge", str(nli), "--processes", "2", "--overwrite"]) == 0
    again = json.loads((tmp_path / "out" / "reefknot.json").read_text())
    assert again["figures"] == figures and again["judge"] == judged["judge"]
