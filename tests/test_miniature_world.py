"""The miniature world's data and model folders.

Truth is checked by an independent reading: captions and questions are parsed back from their text and compared with
the scene files, without the generator's own truth functions.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miniature import language
from miniature.compositional import KINDS, caption_pair
from miniature.dataset import WorldConfig, write_dataset
from miniature.world import (
    CELL,
    COLORS,
    EXTRA_SHAPES,
    GRID,
    HELD_OUT,
    SEEN,
    SHAPES,
    render,
    sample_scene,
)

pytestmark = pytest.mark.once  # nothing here depends on transformers

TRAINING = ("pretrain", "instruct_student", "instruct_teacher")
OBJECT = re.compile(r"(?:(small|large) )?(red|green|blue|yellow|purple|black) (circle|square|triangle|cross|star)")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_dataset(out, WorldConfig.preset("smoke", compositional=12, compositional_unseen=12), progress=False)
    return out


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    from miniature.tokenizer import train_tokenizer

    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_scenes(world: Path) -> dict[str, list[dict]]:
    return {r["image"]: r["objects"] for f in (world / "scenes").glob("*.jsonl") for r in read_jsonl(f)}


def compositional_items(world: Path, pattern: str = "compositional_*") -> list[tuple[str, str, dict]]:
    files = sorted(f for folder in world.glob(pattern) for f in folder.glob("*.json"))
    return [(f.parent.name, f.stem, item) for f in files for item in json.loads(f.read_text()).values()]


# -- an independent reader --------------------------------------------------------------------------------------------


def relation_holds(name: str, a: dict, b: dict) -> bool:
    axis, sign = {"left of": ("col", -1), "right of": ("col", 1), "above": ("row", -1), "below": ("row", 1)}[name]
    return sign * (a[axis] - b[axis]) > 0


def caption_holds(text: str, objects: list[dict]) -> bool:
    mentioned = []
    for size, color, shape in OBJECT.findall(text):
        match = [o for o in objects if (o["color"], o["shape"]) == (color, shape) and size in ("", o["size"])]
        if not match:
            return False
        mentioned.append(match[0])
    assert len(mentioned) >= 2, text
    relation = re.search(r"left of|right of|above|below", text)
    if relation is None:
        return True
    holds = relation_holds(relation[0], mentioned[0], mentioned[1])
    assert holds or relation_holds(relation[0], mentioned[1], mentioned[0]), f"false by a mere tie: {text}"
    return holds


def expected_answer(question: str, objects: list[dict]) -> str | None:
    """The answer by reading the scene, or None for a kind of question that has a set of answers (captions)."""

    def one(**wanted) -> dict:
        (found,) = [o for o in objects if all(o[k] == v for k, v in wanted.items())]
        return found

    if m := re.fullmatch(r"What color is the (\w+)\?", question):
        return one(shape=m[1])["color"].capitalize()
    if m := re.fullmatch(r"What shape is the (\w+) object\?", question):
        return one(color=m[1])["shape"].capitalize()
    if m := re.fullmatch(r"What size is the (\w+) (\w+)\?", question):
        return one(color=m[1], shape=m[2])["size"].capitalize()
    if m := re.fullmatch(r"Which (row|column) is the (\w+) (\w+) in\?", question):
        return str(1 + one(color=m[2], shape=m[3])["col" if m[1] == "column" else "row"])
    if question == "How many objects are there?":
        return str(len(objects))
    if m := re.fullmatch(r"Is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+)\?", question):
        a, b = one(color=m[1], shape=m[2]), one(color=m[4], shape=m[5])
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[m[3]]
        yes, no = relation_holds(m[3], a, b), relation_holds(opposite, a, b)
        assert yes != no, f"a tie has no clear answer: {question}"
        return "Yes" if yes else "No"
    if m := re.fullmatch(r"Is the (\w+) (\w+) (left or right of|above or below) the (\w+) (\w+)\?", question):
        a, b = one(color=m[1], shape=m[2]), one(color=m[4], shape=m[5])
        pair = ("left of", "right of") if m[3].startswith("left") else ("above", "below")
        (holds,) = [relation for relation in pair if relation_holds(relation, a, b)]
        return holds.split()[0].capitalize()
    if question == "Describe the image in detail.":
        ordered = sorted(objects, key=lambda o: (o["row"], o["col"]))
        return ", ".join(
            f"a {o['size']} {o['color']} {o['shape']} in row {o['row'] + 1} column {o['col'] + 1}" for o in ordered
        )
    if m := re.fullmatch(r"Which caption best describes the image\?\n\(A\) (.*)\n \(B\) (.*)\nAnswer.*", question):
        a, b = caption_holds(m[1], objects), caption_holds(m[2], objects)
        assert a != b, question
        return "A" if a else "B"
    if m := re.fullmatch(r'Does this figure show "(.*)"\? Please answer yes or no\.', question):
        return "Yes" if caption_holds(m[1], objects) else "No"
    assert question == "Describe the image.", question
    return None


# -- tests ------------------------------------------------------------------------------------------------------------


def digest(folder: Path) -> dict[str, str]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_same_config_gives_same_bytes_whatever_the_number_of_workers(tmp_path):
    small = WorldConfig.preset("smoke", compositional=2, compositional_unseen=2)
    for name, workers in (("a", 1), ("b", 2)):
        write_dataset(tmp_path / name, small, workers=workers, progress=False)
    write_dataset(tmp_path / "c", WorldConfig.preset("smoke", seed=1), progress=False)
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b
    assert a["instruct_student.json"] != c["instruct_student.json"]
    assert a["images/pretrain/000000.png"] != c["images/pretrain/000000.png"]


def test_conversations_have_llavas_format(world):
    for name in TRAINING:
        records = json.loads((world / f"{name}.json").read_text())
        assert len({r["id"] for r in records}) == len(records)
        for record in records:
            turns = record["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            text = "".join(t["value"] for t in turns)
            if "image" in record:
                assert turns[0]["value"].startswith("<image>\n") and text.count("<image>") == 1
                with Image.open(world / "images" / record["image"]) as image:
                    assert image.size == (42, 42) and image.mode == "RGB"
            else:
                assert "<image>" not in text
        share = sum("image" not in r for r in records) / len(records)
        assert share == 0 if name == "pretrain" else 0.01 < share < 0.06


def test_every_training_answer_follows_from_the_scene(world):
    scenes = read_scenes(world)
    kinds = Counter()
    for name in TRAINING:
        for record in json.loads((world / f"{name}.json").read_text()):
            if "image" not in record:
                continue
            turns = [t["value"].removeprefix("<image>\n") for t in record["conversations"]]
            for question, answer in zip(turns[::2], turns[1::2], strict=True):
                expected = expected_answer(question, scenes[record["image"]])
                kinds[question.split()[0]] += 1
                if expected is None:
                    assert caption_holds(answer, scenes[record["image"]])
                else:
                    assert answer == expected, question
    assert set(kinds) == {"What", "Which", "How", "Is", "Does", "Describe"}


def test_question_sets(world):
    scenes = read_scenes(world)
    for name in ("recognition", "relation"):
        for split in ("val", "test"):
            records = read_jsonl(world / f"{name}_{split}.jsonl")
            assert len({r["question_id"] for r in records}) == len(records) > 0
            for r in records:
                assert set(r) == {"question_id", "image", "text", "answer", "type"}
                assert r["answer"] == expected_answer(r["text"], scenes[r["image"]])
                assert (world / "images" / r["image"]).is_file()
            if name == "relation":
                # Each question has one "Yes" and one "No" image: text alone cannot beat one half.
                asked = Counter((r["text"], r["answer"]) for r in records)
                assert all(asked[t, "Yes"] == asked[t, "No"] for t, _ in asked)
            else:
                assert {r["type"] for r in records} == {"color", "shape", "size", "count"}


def test_compositional_items_are_true_false_and_blind_balanced(world):
    scenes = read_scenes(world)
    items = compositional_items(world)
    assert len(items) == 4 * 7 * 12
    assert {kind for _, kind, _ in items} == set(KINDS)
    for _, kind, item in items:
        assert set(item) == {"filename", "caption", "negative_caption"}
        objects = scenes[item["filename"]]
        assert caption_holds(item["caption"], objects), (kind, item)
        assert not caption_holds(item["negative_caption"], objects), (kind, item)
        lengths = [len(re.sub("(left|right) of", "beside", text).split()) for text in list(item.values())[1:]]
        assert lengths[0] == lengths[1], (kind, item)
    # Whatever score a blind model gives a text, each pair occurs in both roles.
    roles = Counter((f, k, i["caption"], i["negative_caption"]) for f, k, i in items)
    assert all(roles[f, k, a, b] == roles[f, k, b, a] for f, k, a, b in roles)


def test_held_out_pairs_appear_in_unseen_sets_only(world):
    names = {" ".join(p) for p in HELD_OUT}
    for path in [*world.glob("*.json"), *world.glob("*.jsonl"), *world.glob("compositional_*/*.json")]:
        if path.name == "manifest.json":
            continue
        text = path.read_text()
        assert any(n in text for n in names) == path.parent.name.endswith("_unseen"), path
    for image, objects in read_scenes(world).items():
        if "_unseen/" not in image:
            assert not {f"{o['color']} {o['shape']}" for o in objects} & names
    for _, kind, item in compositional_items(world, "compositional_*_unseen"):
        found = [sum(" ".join(m[1:]) in names for m in OBJECT.findall(t)) for t in list(item.values())[1:]]
        assert found[0] == found[1] > 0, (kind, item)


def test_no_scene_occurs_twice(world):
    keys = Counter(json.dumps(objects) for objects in read_scenes(world).values())
    assert max(keys.values()) == 1
    manifest = json.loads((world / "manifest.json").read_text())
    assert sum(manifest["images"].values()) == len(keys) == len(list((world / "images").rglob("*.png")))


def test_images_show_their_scenes(world):
    """Empty cells are plain ground, and the middle of an object is nearest to its own colour."""
    names, palette = list(COLORS), np.array(list(COLORS.values()))
    for path, objects in list(read_scenes(world).items())[::5]:
        pixels = np.asarray(Image.open(world / "images" / path)).astype(float)
        occupied = {(o["row"], o["col"]): o["color"] for o in objects}
        for row in range(GRID):
            for col in range(GRID):
                cell = pixels[row * CELL : (row + 1) * CELL, col * CELL : (col + 1) * CELL]
                ground = cell[0, 0]
                if (row, col) in occupied:
                    far = cell.reshape(-1, 3)[np.abs(cell - ground).sum(-1).argmax()]
                    nearest = names[np.abs(palette - far).sum(-1).argmin()]
                    assert nearest == occupied[row, col]
                else:
                    assert np.abs(cell - np.median(cell, axis=(0, 1))).max() < 40


def test_answers_are_balanced():
    rng = np.random.default_rng(0)
    answers = {kind: Counter() for kind in ("horizontal", "vertical", "choice", "match")}
    by_relation = Counter()
    for _ in range(1500):
        scene = sample_scene(rng)
        for kind, counter in answers.items():
            question, answer = language.ask(kind, scene, rng)
            counter[answer] += 1
            if kind in ("horizontal", "vertical"):
                by_relation[re.search(r"left of|right of|above|below", question)[0], answer] += 1
    for kind, counter in answers.items():
        first = counter.most_common()[0][1] / sum(counter.values())
        assert first < 0.55, (kind, counter)
    for relation in language.RELATIONS:
        yes, no = by_relation[relation, "Yes"], by_relation[relation, "No"]
        assert abs(yes - no) < 0.15 * (yes + no), relation


@pytest.mark.parametrize("kind", KINDS)
def test_caption_pairs_differ_as_their_kind_says(kind):
    rng = np.random.default_rng(1)
    for unseen in (False, True):
        for _ in range(50):
            first, second = caption_pair(kind, rng, unseen)
            assert len(first.mentions) == len(second.mentions)
            assert str(first) != str(second)
            changed = [a != b for a, b in zip(first.mentions, second.mentions, strict=True)]
            assert sum(changed) == {"replace_obj": 1, "replace_att": 1, "replace_rel": 0, "add_obj": 1}.get(kind, 2)
            assert (first.relation != second.relation) == (kind == "replace_rel")


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="even"):
        WorldConfig(compositional=3)
    with pytest.raises(ValueError, match="unknown preset 'big'"):
        WorldConfig.preset("big")
    with pytest.raises(ValueError, match="unknown question kind 'colour'"):
        language.ask("colour", sample_scene(np.random.default_rng(0)), np.random.default_rng(0))


def test_a_finished_world_is_kept_and_never_mixed_with_another(tmp_path):
    config = WorldConfig.preset("smoke", instruct_teacher=8)
    first = write_dataset(tmp_path, config, progress=False)
    changed = (tmp_path / "pretrain.json").stat().st_mtime_ns
    assert write_dataset(tmp_path, config, progress=False) == first
    assert (tmp_path / "pretrain.json").stat().st_mtime_ns == changed
    with pytest.raises(FileExistsError, match="another config"):
        write_dataset(tmp_path, WorldConfig.preset("smoke", instruct_teacher=8, seed=1), progress=False)


def test_records_per_image_spreads_the_rounds(tmp_path):
    config = WorldConfig.preset("smoke", records_per_image=20, text_only_rate=0.0)
    write_dataset(tmp_path, config, progress=False)
    records = json.loads((tmp_path / "instruct_student.json").read_text())
    assert all(len(r["conversations"]) == 2 and r["conversations"][0]["value"].startswith("<image>") for r in records)
    assert len({r["image"] for r in records}) == config.instruct_student


def test_tokenizer_round_trip_fast_and_slow(world, tokenizer_folder):
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoTokenizer.from_pretrained
    fast, slow = load(str(tokenizer_folder)), load(str(tokenizer_folder), use_fast=False)
    assert type(slow).__name__.startswith("Qwen2Tokenizer")
    records = json.loads((world / "instruct_student.json").read_text())
    texts = [t["value"] for r in records for t in r["conversations"]]
    texts += ["<|im_start|>user\nIs it?<|im_end|>\n", "Größe 12  ✓ don't"]
    for text in texts:
        ids = fast(text).input_ids
        assert ids == slow(text).input_ids
        assert fast.decode(ids) == text
    for tokenizer in (fast, slow):
        assert tokenizer.bos_token is None
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    words = language.words(t.replace("<image>", "") for t in texts[:-2])
    assert words <= set(language.vocabulary())
    for word in language.vocabulary():
        assert len(fast(word).input_ids) == 1 or "'" in word
        assert len(fast(f" {word}").input_ids) == 1 or "'" in word or word.isdigit()


def test_tower_trains_saves_and_loads(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from miniature import tower

    settings = tower.TowerSettings(steps=4, batch_size=8, warmup=1)
    report = tower.train_tower(tmp_path, settings, evaluate_on=8, progress=False)
    assert set(tower.HEADS) | {"empty"} <= set(report)
    model, info = transformers.SiglipVisionModel.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = transformers.SiglipImageProcessor.from_pretrained(str(tmp_path))
    scene = sample_scene(np.random.default_rng(0))
    pixels, labels = tower.render_batch([scene], np.random.default_rng(1))
    seen = processor(render(scene, np.random.default_rng(1)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, torch.from_numpy(pixels), atol=1e-5, rtol=0)
    assert labels.shape == (1, 9, 5)
    states = tower.features(model.eval(), seen)
    assert states.shape == (1, 9, settings.hidden_size)
    # The last layer is not part of what LLaVA reads.
    torch.testing.assert_close(states, model(seen, output_hidden_states=True).hidden_states[-2])


def test_tower_training_never_shows_a_held_out_pair():
    from miniature.tower import training_scene

    rng = np.random.default_rng(0)
    pairs = {o.pair for _ in range(400) for o in training_scene(rng).objects}
    assert not pairs & set(HELD_OUT) and set(SEEN) <= pairs
    assert {s for _, s in pairs} == {*SHAPES, *EXTRA_SHAPES}


def test_language_models_are_real_folders(tmp_path, tokenizer_folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from miniature import language_models as lm

    settings = lm.PretrainSettings(steps=3, batch_size=2, length=32, warmup=1)
    sizes = {}
    for name, spec in (("student", lm.STUDENT), ("teacher", lm.TEACHER)):
        report = lm.build_language_model(tmp_path / name, tokenizer_folder, spec, settings, progress=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / name)).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / name))
        assert type(model).__name__ == "Qwen2ForCausalLM"
        assert model.config.vocab_size > len(tokenizer)
        assert model.config.eos_token_id == tokenizer.eos_token_id
        assert np.isfinite(report["last_loss"])
        with torch.no_grad():
            logits = model(**tokenizer("Is the red circle above the blue square?", return_tensors="pt")).logits
        assert logits.shape[-1] == model.config.vocab_size
        sizes[name] = model.config.vocab_size
    assert sizes["student"] != sizes["teacher"]
    llama = transformers.LlamaForCausalLM(lm.llama_config(lm.STUDENT, tokenizer))
    assert llama.config.num_hidden_layers == lm.STUDENT.num_hidden_layers
