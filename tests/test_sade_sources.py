"""SADE's sources, in the forms that such files have, become the one file that `eval` reads."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from llava_compodistill.cli import main
from llava_compodistill.eval.benchmarks.sade import load as sade

pytestmark = pytest.mark.once  # nothing here depends on transformers


@pytest.fixture
def root(tmp_path):
    images = tmp_path / "sade" / "images" / "VG"
    images.mkdir(parents=True)
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGB", (4, 4)).save(images / name)
    return tmp_path


def call(root, file, content, *flags):
    (root / file).write_text(content)
    return main(["sade", str(root / file), "--data-root", str(root), "--image-prefix", "VG/", *flags])


RELATION = (
    "--category",
    "relation",
    "--source",
    "ARO-VG",
    "--image",
    "path",
    "--positive",
    "good",
    "--negatives",
    "bad",
)


def test_sources_of_several_forms(root, capsys):
    aro = [{"path": "1.jpg", "good": "a on b", "bad": "b on a"}, {"path": "2.jpg", "good": "c", "bad": ["d", "e"]}]
    assert call(root, "aro.json", json.dumps(aro), *RELATION) == 0
    pairs = [["1.jpg", {"POS": ["red"], "NEG": ["blue"]}]]
    flags = (
        "--category",
        "attribute",
        "--source",
        "VLC",
        "--image",
        "0",
        "--positive",
        "1.POS",
        "--negatives",
        "1.NEG.0",
    )
    assert call(root, "vlc.json", json.dumps(pairs), *flags) == 0
    flags = "--category negate --source CREPE --image i --positive t --negatives f1 f2".split()
    assert call(root, "crepe.csv", "i,t,f1,f2\n1.jpg,is,is not,was\n", *flags) == 0
    flags = "--category comprehensive --source W --image a b --captions x y".split()
    line = json.dumps({"a": "1.jpg", "b": "2.jpg", "x": "one", "y": "two"})
    assert call(root, "w.jsonl", line + "\n\n", *flags) == 0
    assert "comprehensive 1, relation 2, attribute 1, atomic 0, negate 1" in capsys.readouterr().out
    items = sade(root)
    assert [(item.fields["category"], len(item.captions), len(item.images)) for item in items] == [
        ("relation", 2, 1), ("relation", 3, 1), ("attribute", 2, 1), ("negate", 3, 1), ("comprehensive", 2, 2),
    ]  # fmt: skip
    assert items[2].captions == ("red", "blue") and items[0].captions == ("a on b", "b on a")
    # Once more: what was taken from this source is replaced, the others stay.
    assert call(root, "aro.json", json.dumps({"7": aro[0]}), *RELATION) == 0
    assert len(sade(root)) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"path": "1.jpg", "good": "a"}]', "entry 0: bad leads nowhere at 'bad'; there is path, good"),
        ('[{"path": "1.jpg", "good": " ", "bad": "b"}]', "entry 0: good must be a text or a list of texts, is ' '"),
        ('[{"path": "1.jpg", "good": ["a", "b"], "bad": "b"}]', "good holds 2 texts; one is true"),
        ('{"x": {"path": ["1.jpg", "2.jpg"], "good": "a", "bad": "b"}}', "item x: --image names 2 images"),
        ("[]", "holds no entries"),
        ("3", "must hold a list or an object of entries, is a int"),
        ("{", "no JSON"),
    ],
)
def test_what_cannot_be_converted_is_named_and_nothing_written(root, capsys, content, message):
    assert call(root, "aro.json", content, *RELATION) == 2
    assert message in capsys.readouterr().err and not (root / "sade" / "sade.jsonl").exists()


def test_fields_that_are_not_named(root, capsys):
    with pytest.raises(SystemExit):
        call(root, "a.json", "[]", "--category", "negate", "--source", "x", "--image", "i")
    assert "--category negate needs --positive and --negatives" in capsys.readouterr().err
    assert main(["sade", str(root / "none.json"), *RELATION]) == 2
    assert "none.json: there is no such file" in capsys.readouterr().err
