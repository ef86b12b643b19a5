"""The benchmarks' local files and the files of records: what is read, what is refused, and what a kill leaves."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from llava_compodistill.errors import DataError, RecordsError
from llava_compodistill.eval.benchmarks import files, reefknot, registered
from llava_compodistill.eval.benchmarks.base import EngineBenchmark
from llava_compodistill.eval.benchmarks.sade import CATEGORIES
from llava_compodistill.eval.benchmarks.sugarcrepe import SUBSETS
from llava_compodistill.eval.hub import fetch, unpack
from llava_compodistill.eval.records import RecordFile, fingerprint, read_records, weights_of
from miniature.benchmarks import write_benchmarks

pytestmark = pytest.mark.once  # nothing here depends on transformers

OURS = registered(EngineBenchmark)


def load(name, data):
    return OURS[name].load(data)


@pytest.fixture
def data(world, tmp_path):
    write_benchmarks(world["data"], tmp_path / "eval")
    return tmp_path / "eval"


def rewrite(path, change):
    """Change the objects of a JSON-lines file."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in change(entries)))


@pytest.mark.parametrize("name", OURS)
def test_every_format_is_read(data, name):
    items = load(name, data)
    assert len({item.id for item in items}) == len(items) >= 4
    for item in items:
        assert bool(item.captions) != bool(item.prompt) and item.images
    if name in ("bivlc", "winoground"):
        assert all(len(item.images) == len(item.captions) == 2 for item in items)
        assert all(item.images[0] != item.images[1] for item in items)
    if name == "sugarcrepe":
        assert set(Counter(item.fields["subset"] for item in items)) == set(SUBSETS)
    if name == "sade":
        assert set(item.fields["category"] for item in items) == set(CATEGORIES)
        assert any(len(item.captions) == 4 for item in items)
    if name == "rbench":
        assert {number for item in items for number in item.fields["lists"]} == {1, 2, 3, 4, 5}
    if name == "reefknot":
        assert set(item.fields["task"] for item in items) == set(reefknot.TASKS)


@pytest.mark.parametrize("name", OURS)
def test_nothing_there_says_how_to_get_it(tmp_path, name):
    with pytest.raises(DataError, match=name.split("-")[0]) as error:
        load(name, tmp_path)
    assert OURS[name].how_to_get[:20] in str(error.value)


def test_missing_images_are_counted_and_named(data, world):
    items = load("winoground", data)
    hidden = [world["data"] / "images" / "hidden.png"]
    rewrite(
        data / "winoground" / "examples.jsonl",
        lambda entries: [{**entries[0], "image_0": hidden[0].name}, *entries[1:]],
    )
    with pytest.raises(
        DataError, match=rf"winoground: 1 of {2 * len(items)} images are missing \(.*hidden.png of .*line 1\)"
    ):
        load("winoground", data)


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("bivlc", "bivlc.jsonl", lambda e: e.pop("caption"), "bivlc.jsonl, line 2: has no 'caption', only image"),
        ("bivlc", "bivlc.jsonl", lambda e: e.update(caption=" "), "line 2: caption must be a text"),
        ("sade", "sade.jsonl", lambda e: e.update(category="color"), "line 2: category 'color' must be one of"),
        ("sade", "sade.jsonl", lambda e: e.update(negatives=[]), "line 2: negatives is empty"),
        ("sade", "sade.jsonl", lambda e: e.update(negatives="a"), "line 2: negatives must be a list of texts"),
        ("reefknot", "YESNO.jsonl", lambda e: e.update(label="maybe"), "line 2: label 'maybe' must be yes or no"),
        ("reefknot", "VQA.jsonl", lambda e: e.pop("query_prompt"), "VQA.jsonl, line 2: has no 'query_prompt'"),
    ],
)
def test_wrong_fields_are_named_with_their_line(data, name, file, change, message):
    def second(entries):
        change(entries[1])
        return entries

    rewrite(data / name / file, second)
    with pytest.raises(DataError, match=message):
        load(name, data)


def test_ids_that_stand_twice_are_named(data):
    rewrite(data / "sade" / "sade.jsonl", lambda entries: [*entries[:3], {**entries[3], "id": entries[1]["id"]}])
    with pytest.raises(DataError, match=r"sade.jsonl, line 4: the id '1' is that of .*sade.jsonl, line 2 already"):
        load("sade", data)


def test_broken_files_are_named(data):
    (data / "sugarcrepe" / "swap_obj.json").write_text("{")
    with pytest.raises(DataError, match="swap_obj.json: no JSON"):
        load("sugarcrepe", data)
    path = data / "winoground" / "examples.jsonl"
    path.write_text(path.read_text() + '{"id": 7, "ima\n')
    with pytest.raises(DataError, match=r"examples.jsonl, line \d+: no JSON"):
        load("winoground", data)
    listed = data / "rbench" / "nocaps_image-level_rel_ids_3.json"
    before = load("rbench", data)
    ids = json.loads(listed.read_text())
    listed.write_text(json.dumps([*ids, ids[0], 123456]))  # twice, and taken out again
    for item, earlier in zip(load("rbench", data), before, strict=True):
        again = [3] if item.id == str(ids[0]) else []
        assert sorted(item.fields["lists"]) == sorted([*earlier.fields["lists"], *again])
    listed.write_text("[123456]")
    with pytest.raises(DataError, match="ids_3.json: none of its 1 questions is in"):
        load("rbench", data)


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------
RUN = {"benchmark": "sugarcrepe", "model": "a", "fingerprint": "f"}
IDS = ["one", "two", "three"]


def test_what_made_the_records_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Records are synced; without it beside them a power cut would leave nobody who can go on with them."""
    synced, replace = {}, Path.replace

    def sync(descriptor):
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    def named(path, target):
        assert synced.get(path.stat().st_ino) == path.stat().st_size > 0
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", named)
    with RecordFile(tmp_path / "r.jsonl", RUN, IDS):
        pass
    assert json.loads((tmp_path / "r.jsonl.run.json").read_text()) == RUN


def test_records_are_gone_on_with(tmp_path):
    path = tmp_path / "out" / "r.jsonl"
    with RecordFile(path, RUN, IDS) as records:
        assert not records.done
        records.append([{"id": "one", "scores": [[1.5], [0.25]]}])
    with RecordFile(path, RUN, IDS) as records:
        assert list(records.done) == ["one"]
        records.append([{"id": "two", "text": "ä"}, {"id": "three", "text": ""}])
    assert [record["id"] for record in read_records(path)] == IDS
    assert read_records(path)[0]["scores"] == [[1.5], [0.25]] and read_records(path)[1]["text"] == "ä"


def test_a_half_written_line_is_taken_away_and_asked_again(tmp_path):
    path = tmp_path / "r.jsonl"
    with RecordFile(path, RUN, IDS) as records:
        records.append([{"id": "one"}, {"id": "two"}])
    path.write_bytes(path.read_bytes()[:-5])
    with RecordFile(path, RUN, IDS) as records:
        assert list(records.done) == ["one"] and path.read_text() == '{"id": "one"}\n'
        records.append([{"id": "two"}])
    assert [record["id"] for record in read_records(path)] == ["one", "two"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{}"], "line 1: no record"),
        (['{"id": "one"}', "nonsense"], "line 2: no JSON .*--overwrite begins anew"),
        (['{"id": "four"}'], "line 1: there is no item 'four'"),
        (['{"id": "one"}', '{"id": "one"}'], "line 2: the item 'one' is there already"),
    ],
)
def test_lines_that_do_not_belong_are_named(tmp_path, lines, message):
    path = tmp_path / "r.jsonl"
    RecordFile(path, RUN, IDS).close()
    path.write_text("\n".join(lines) + "\n")
    before = path.read_text()
    with pytest.raises(RecordsError, match=message):
        RecordFile(path, RUN, IDS)
    assert path.read_text() == before


def test_records_of_another_run_are_not_mixed(tmp_path):
    path = tmp_path / "r.jsonl"
    with RecordFile(path, RUN, IDS) as records:
        records.append([{"id": "one"}])
    with pytest.raises(RecordsError, match="another run: model 'a', not 'b'.*--overwrite"):
        RecordFile(path, {**RUN, "model": "b"}, IDS)
    with RecordFile(path, {**RUN, "model": "b"}, IDS, overwrite=True) as records:
        assert not records.done
        records.append([{"id": "one"}])
    path.with_name("r.jsonl.run.json").unlink()
    with pytest.raises(RecordsError, match="r.jsonl.run.json.*is missing or broken"):
        RecordFile(path, RUN, IDS)


def test_a_checkpoint_of_which_one_small_tensor_was_trained_is_another(tmp_path):
    """As when only MLP_S learns: a few numbers somewhere in the middle of a large file."""
    tensors = {f"layer.{number}": torch.zeros(200_000) for number in range(4)}
    tensors["layer.1.bias"] = torch.zeros(3, dtype=torch.bfloat16)
    seen = set()
    for changed in (None, "layer.1.bias", "layer.2"):
        if changed:
            tensors[changed][-1] += 1
        folder = tmp_path / str(changed)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file(tensors, folder / "model.safetensors")
        seen.add(weights_of(str(folder)))
        torch.save(tensors, folder / "model.bin")
        seen.add(weights_of(str(folder)))
        copy = folder.rename(tmp_path / f"moved-{changed}")
        assert weights_of(str(copy)) in seen
    (copy / "model.safetensors").write_bytes(b"junk")
    assert len(seen) == 6 and weights_of(str(copy)) not in seen and weights_of("owner/name") == ""


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_process_writes_at_a_time(tmp_path, overwrite):
    path = tmp_path / "r.jsonl"
    with RecordFile(path, RUN, IDS) as records:
        records._file.write('{"id": "one", "te')  # in the middle of a line
        records._file.flush()
        with pytest.raises(RecordsError, match="another process is writing"):
            RecordFile(path, RUN, IDS, overwrite=overwrite)
        records._file.write('xt": "y"}\n')
    with RecordFile(path, RUN, IDS) as records:
        assert records.done["one"]["text"] == "y"


def test_other_line_separators_are_part_of_a_text(tmp_path):
    path = tmp_path / "r.jsonl"
    with RecordFile(path, RUN, IDS) as records:
        records.append([{"id": "one", "text": "a\u2028b\u0085c"}])
    with RecordFile(path, RUN, IDS) as records:
        assert records.done["one"]["text"] == "a\u2028b\u0085c"
    assert read_records(path)[0]["text"] == "a\u2028b\u0085c"


def test_the_fingerprint_knows_what_is_asked_and_not_where_it_lies(data, world, tmp_path):
    def of(root):
        return fingerprint(item.asked() for item in load("sugarcrepe", root))

    write_benchmarks(world["data"], tmp_path / "elsewhere")
    assert of(data) == of(tmp_path / "elsewhere")
    path = data / "sugarcrepe" / "swap_obj.json"
    entries = json.loads(path.read_text())
    entries["0"]["caption"] += "!"
    path.write_text(json.dumps(entries))
    assert of(data) != of(tmp_path / "elsewhere")


# ---------------------------------------------------------------------------------------------------------------------
# The hub, which a stand-in plays
# ---------------------------------------------------------------------------------------------------------------------
def winoground_files(root, count):
    """Winoground's data set as it lies on the hub, below a folder: its own examples and zip, without columns."""
    (root / "data").mkdir(parents=True)
    entries = []
    with zipfile.ZipFile(root / "data" / "images.zip", "w") as archive:
        for number in range(count):
            entries.append({"id": number, "caption_0": "a b", "caption_1": "b a", "collapsed_tag": "Object"})
            for place in (0, 1):
                entries[-1][f"image_{place}"] = f"ex_{number}_img_{place}"
                file = io.BytesIO()
                Image.new("RGB", (8, 8), ("red", "blue")[place]).save(file, "PNG")
                archive.writestr(f"images/ex_{number}_img_{place}.png", file.getvalue())
        archive.writestr("__MACOSX/images/._ex_0_img_0.png", b"?")
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (root / "data" / "examples.jsonl").write_text(lines)
    return root


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """`datasets` and `huggingface_hub` modules that know three benchmarks."""
    picture = Image.new("L", (8, 8), 99)
    rows = {
        f"HuggingFaceM4/SugarCrepe_{subset}": [{"image": picture, "tested_labels": [f"true {subset}", "false"]}] * 2
        for subset in SUBSETS
    }
    both = {"caption": "a", "negative_caption": "b", "type": "swap", "subtype": "obj"}
    rows["imirandam/BiVLC"] = [{"image": picture, "negative_image": picture, **both}] * 3
    files = {"facebook/winoground": winoground_files(tmp_path / "winoground-on-the-hub", 4)}
    asked = []

    def hf_hub_download(repository, name, repo_type):
        assert repo_type == "dataset"
        asked.append(repository)
        if repository not in files:
            raise RuntimeError(f"{repository} is gated.\nmore")
        return str(files[repository] / name)

    def load_dataset(repository, split):
        assert split == "test"
        asked.append(repository)
        if repository not in rows:
            raise RuntimeError(f"{repository} is gated.\nmore")
        return rows[repository]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    return SimpleNamespace(rows=rows, files=files, asked=asked)


@pytest.mark.parametrize(("name", "count"), [("sugarcrepe", 14), ("bivlc", 3), ("winoground", 4)])
def test_the_hub_s_data_is_written_in_the_local_layout(hub, tmp_path, name, count):
    fetch(OURS[name], tmp_path)
    items = load(name, tmp_path)
    assert len(items) == count and items[0].captions[0] in ("true add_att", "a", "a b")
    times = len(hub.asked)
    fetch(OURS[name], tmp_path)  # is there already
    assert len(hub.asked) == times


def test_what_the_hub_refuses_is_explained_and_leaves_nothing_half_written(hub, tmp_path, monkeypatch):
    del hub.files["facebook/winoground"], hub.rows["HuggingFaceM4/SugarCrepe_swap_obj"]
    with pytest.raises(DataError, match="facebook/winoground is gated. .*hf auth login"):
        fetch(OURS["winoground"], tmp_path)
    assert not (tmp_path / "winoground" / "examples.jsonl").exists()
    with pytest.raises(DataError, match="SugarCrepe_swap_obj"):
        fetch(OURS["sugarcrepe"], tmp_path)
    hub.rows["HuggingFaceM4/SugarCrepe_swap_obj"] = hub.rows["HuggingFaceM4/SugarCrepe_swap_att"]
    fetch(OURS["sugarcrepe"], tmp_path)
    assert hub.asked.count("HuggingFaceM4/SugarCrepe_add_att") == 1 and len(load("sugarcrepe", tmp_path)) == 14
    with pytest.raises(DataError, match="sade is not on the hub"):
        fetch(OURS["sade"], tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    fetch(OURS["sugarcrepe"], tmp_path)  # is there already
    with pytest.raises(DataError, match=r"pip install 'llava-compodistill\[eval\]'"):
        fetch(OURS["bivlc"], tmp_path)


def test_the_datasets_package_itself(tmp_path, monkeypatch):
    """Repositories that lie in this folder under the hub's names: what `datasets` makes of real files."""
    datasets = pytest.importorskip("datasets", reason="the datasets package is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def repository(name, rows, images):
        kinds = {
            key: datasets.Image() if key in images else datasets.Sequence(datasets.Value("string"))
            if isinstance(value, list) else datasets.Value("int64" if isinstance(value, int) else "string")
            for key, value in rows[0].items()
        }  # fmt: skip
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        (tmp_path / name / "data").mkdir(parents=True)
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        made.to_parquet(tmp_path / name / "data" / "test-00000-of-00001.parquet")

    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    both = {"caption": "a", "negative_caption": "b", "type": "swap", "subtype": "obj"}
    repository(
        "imirandam/BiVLC", [{**both, "image": pictures[0], "negative_image": pictures[1]}], ("image", "negative_image")
    )
    for subset in SUBSETS:
        repository(
            f"HuggingFaceM4/SugarCrepe_{subset}",
            [{"image": pictures[0], "tested_labels": ["true", "false"]}],
            ("image",),
        )
    for name, count in (("bivlc", 1), ("sugarcrepe", 7)):
        fetch(OURS[name], tmp_path / "eval")
        items = load(name, tmp_path / "eval")
        assert len(items) == count
    first = load("bivlc", tmp_path / "eval")[0]
    assert [Image.open(image).getpixel((0, 0)) for image in first.images] == [(255, 0, 0), (0, 0, 255)]
    assert load("sugarcrepe", tmp_path / "eval")[0].captions == ("true", "false")
    # The same files, downloaded by hand: the hub is not asked.
    for place in ("BiVLC", "bivlc/BiVLC"):
        own = tmp_path / place.replace("/", "-")
        shutil.copytree(tmp_path / "imirandam" / "BiVLC", own / place)
        fetch(OURS["bivlc"], own, online=False)
        assert load("bivlc", own)[0].captions == first.captions


def test_a_download_of_one_subset_is_not_taken_for_the_others(hub, tmp_path, monkeypatch):
    """Nor is anybody's parquet file in a folder called data."""
    mine = tmp_path / "mine"
    for place in ("sugarcrepe/data", "data"):
        (mine / place).mkdir(parents=True)
        (mine / place / "test-00000-of-00001.parquet").write_bytes(b"?")
    for name in ("sugarcrepe", "bivlc", "winoground"):
        fetch(OURS[name], mine, online=False)
    assert not list(mine.rglob("*.json*"))
    hub.rows["imirandam/BiVLC"] = [{"image": Image.new("L", (8, 8)), "caption": "a"}]
    with pytest.raises(DataError, match="bivlc: the data set has no column 'negative_image'"):
        fetch(OURS["bivlc"], mine)


def test_the_hub_does_not_stand_in_for_the_authors_own_files(hub, data):
    root = data / "mine"
    moved(data, root, [("sugarcrepe", "sugar-crepe/data")])
    fetch(OURS["sugarcrepe"], root)
    assert not hub.asked and len(load("sugarcrepe", root)) == len(load("sugarcrepe", data))


def test_what_nobody_has_downloaded_is_left_alone_without_the_hub(tmp_path):
    for name in OURS:
        fetch(OURS[name], tmp_path, online=False)
    assert not any(tmp_path.rglob("*"))


# ---------------------------------------------------------------------------------------------------------------------
# As the authors' downloads lie on disk
# ---------------------------------------------------------------------------------------------------------------------
def moved(data, root, pairs):
    """Some of what `write_benchmarks` wrote, under other names; what is below `root` then."""
    for old, new in pairs:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        if (data / old).is_symlink():
            (root / new).symlink_to((data / old).resolve())
        else:
            shutil.copytree(data / old, root / new, symlinks=True)
    return root


def strip(root, name):
    """Take a link to the images out of a copied folder."""
    (root / name).unlink()


@pytest.mark.parametrize("home", ["sugarcrepe", "sugar-crepe", "sugar-crepe-main"])
@pytest.mark.parametrize("images", ["data/coco/images/val2017", "coco/images/val2017"])
def test_sugarcrepe_as_its_repository_has_it(data, tmp_path, home, images):
    root = tmp_path / "mine"
    moved(data, root, [("sugarcrepe", f"{home}/data"), ("sugarcrepe/images", f"{home}/{images}")])
    strip(root, f"{home}/data/images")
    assert [item.asked() for item in load("sugarcrepe", root)] == [item.asked() for item in load("sugarcrepe", data)]


@pytest.mark.parametrize("images", ["image/validation", "images"])
@pytest.mark.parametrize("name", ["rbench", "rbench-box", "rbench-mask"])
def test_rbench_as_its_download_lies(data, tmp_path, name, images):
    root = tmp_path / "mine"
    moved(data, root, [("rbench", "R-Bench/data_filterd"), ("rbench/images", f"R-Bench/{images}")])
    strip(root, "R-Bench/data_filterd/images")
    (root / "R-Bench" / "images").mkdir(exist_ok=True)  # an empty folder is not where the images are
    found = load(name, root)
    assert [item.prompt for item in found] == [item.prompt for item in load(name, data)]
    assert all(item.max_new_tokens == 128 for item in found)


def test_reefknot_and_visual_genome_as_they_are_unpacked(data, tmp_path):
    root = tmp_path / "mine"
    moved(data, root, [("reefknot", "Reefknot/Dataset"), ("reefknot/VG_100K", "VG_dataset/VG_100K")])
    strip(root, "Reefknot/Dataset/VG_100K")
    assert [item.asked() for item in load("reefknot", root)] == [item.asked() for item in load("reefknot", data)]


def test_winoground_as_it_lies_on_the_hub(tmp_path):
    winoground_files(tmp_path / "winoground", 3)
    fetch(OURS["winoground"], tmp_path, online=False)
    items = load("winoground", tmp_path)
    assert [item.id for item in items] == ["0", "1", "2"] and items[0].fields == {"tag": "Object"}
    assert [Image.open(image).getpixel((0, 0)) for image in items[0].images] == [(255, 0, 0), (0, 0, 255)]
    (tmp_path / "other" / "winoground").mkdir(parents=True)
    (tmp_path / "other" / "winoground" / "images.zip").write_bytes(b"no zip")
    shutil.copy(tmp_path / "winoground" / "data" / "examples.jsonl", tmp_path / "other" / "winoground")
    with pytest.raises(DataError, match="images.zip: cannot be unpacked"):
        fetch(OURS["winoground"], tmp_path / "other", online=False)


def test_what_was_read_is_noted_with_its_hash(data):
    with files.noted() as read:
        load("rbench", data)
    named = files.named_below(data, read)
    assert list(named) == [
        "rbench/image-level_filterd.json", *(f"rbench/nocaps_image-level_rel_ids_{n}.json" for n in range(1, 6))
    ]  # fmt: skip
    path = data / "rbench" / "image-level_filterd.json"
    assert named["rbench/image-level_filterd.json"] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    many = {data / "MME" / f"{number}.txt": str(number) for number in range(13)}
    assert set(files.named_below(data, many)) == {"MME/*.txt"}
    assert files.named_below(data, many) != files.named_below(data, {**many, data / "MME" / "3.txt": "x"})


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"0": "\xff"}', "no UTF-8 text"),
        (b"[" * 100_000, "no JSON"),
        (b'{"0": ' + b"1" * 5000 + b"}", "no JSON"),
        (None, "Is a directory"),
    ],
)
def test_files_of_all_kinds_are_named(data, content, message):
    for name, file in (("sugarcrepe", "swap_obj.json"), ("bivlc", "bivlc.jsonl"), ("pope", "llava_pope_test.jsonl")):
        path = data / name / file
        path.unlink()
        path.write_bytes(content) if content is not None else path.mkdir()
        look_at = OURS.get(name) or registered()[name]
        with pytest.raises((DataError, RecordsError), match=f"{file}.*(?:{message}|no JSON|has no 'question_id')"):
            look_at.load(data) if name in OURS else look_at.check(data)


def test_names_that_no_file_can_have_are_missing(data):
    name = "x" * 300 + ".png"
    rewrite(data / "bivlc" / "bivlc.jsonl", lambda entries: [{**entries[0], "image": name}, *entries[1:]])
    with pytest.raises(DataError, match=r"bivlc: 1 of \d+ images are missing"):
        load("bivlc", data)
    questions = data / "pope" / "llava_pope_test.jsonl"
    rewrite(questions, lambda entries: [{**entry, "image": name} for entry in entries])
    with pytest.raises(RecordsError, match="line 1: its image .* is missing"):
        registered()["pope"].check(data)


def test_records_hold_half_characters(tmp_path):
    path = tmp_path / "r.jsonl"
    with RecordFile(path, RUN, IDS) as records:
        records.append([{"id": "one", "text": "ä\ud800"}, {"id": "two", "text": "ä"}])
    assert [record["text"] for record in read_records(path)] == ["ä\ud800", "ä"]
    assert "ä" in path.read_text(encoding="utf-8").splitlines()[1]


@pytest.mark.parametrize("error", [zlib.error("invalid block"), RuntimeError("password required"), EOFError("end")])
def test_a_download_that_cannot_be_unpacked_is_named(tmp_path, monkeypatch, error):
    def read(self, entry):
        raise error

    winoground_files(tmp_path, 1)
    monkeypatch.setattr("zipfile.ZipFile.read", read)
    with pytest.raises(DataError, match=rf"images\.zip: cannot be unpacked \({error}\)"):
        unpack(tmp_path / "data" / "images.zip", tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_a_text_from_the_hub_that_is_none_is_named(hub, tmp_path):
    (hub.files["facebook/winoground"] / "data" / "examples.jsonl").write_bytes(b"\xff{}\n")
    with pytest.raises(DataError, match=r"examples\.jsonl: no UTF-8 text"):
        fetch(OURS["winoground"], tmp_path)
    assert not (tmp_path / "winoground" / "examples.jsonl").exists()
