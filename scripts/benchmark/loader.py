"""Suite loader: samples a second that one core prepares for training, part by part, and the workers that a GPU needs.

A sample is what `train.data` gives and `train.facts` collates: its record read, the image opened, decoded, padded to a
square and preprocessed for SigLIP at 384 x 384, its conversation of three rounds tokenized, the batch's pixels rounded
to bfloat16. The parts are timed by themselves, in CPU time on one thread, as a worker has it; then whole samples, with
the processor of transformers and with the table (`hosts.llava.pixels`), whose pixels are compared first. A GPU that
takes S samples a second needs S over a core's samples a second, in whole workers, beside its training process.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from images import write_images
from measure import compare
from PIL import Image

from llava_compodistill.hosts.llava import import_llava, register
from llava_compodistill.hosts.llava.images import open_rgb
from llava_compodistill.hosts.llava.pixels import TablePixels, quick

PIXELS = 384
#: (width, height) of the files: as the tower takes them, of photographs as COCO has them, and of larger ones.
SIZES = ((384, 384), (640, 480), (1920, 1440))
#: Samples a second of GPUs.
RATES = (2, 4, 8, 16, 33)
#: What the model computes in.
DTYPE = torch.bfloat16
#: Samples that are timed, and that are collated at once.
COUNT, BATCH = 16, 8
#: Longer than the texts that training remembers, as if every sample had its own.
QUESTION = "What stands beside the table, and what color is it? " * 6
ANSWER = "A chair with a blue seat and four thin legs. " * 6


def make_data(folder: Path, size: tuple[int, int]) -> list[str]:
    """Images, and a file of samples about them, of three rounds."""
    folder.mkdir()
    names = write_images(folder, size, COUNT)
    turns = [{"from": who, "value": text} for who, text in (("human", QUESTION), ("gpt", ANSWER))] * 3
    first = {"from": "human", "value": f"<image>\n{QUESTION}"}
    records = [
        {"id": str(number), "image": Path(name).name, "conversations": [first, *turns[1:]]}
        for number, name in enumerate(names)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return names


def make_dataset(folder: Path, tokenizer: Any, processor: Any) -> Any:
    """Training's own data set."""
    from llava_compodistill.train.data import CheckedDataset

    options = {
        "image_folder": str(folder), "image_processor": processor, "image_aspect_ratio": "pad", "is_multimodal": True,
        "mm_use_im_start_end": False, "bad_samples": "error", "check_images": True,
    }  # fmt: skip
    return CheckedDataset(str(folder / "data.json"), tokenizer, SimpleNamespace(**options))


def make_collator(tokenizer: Any) -> Any:
    """Training's own, for a model that computes in bfloat16."""
    from llava_compodistill.hosts.llava.training import DataCollatorForSupervisedDataset
    from llava_compodistill.train.facts import CountingCollator

    collator = DataCollatorForSupervisedDataset(tokenizer=tokenizer)
    return CountingCollator(collator, 729, 2048, None, DTYPE)


def read_tokenizer(folder: Path) -> Any:
    """The miniature's, under the template that students are trained with."""
    from transformers import AutoTokenizer

    from llava_compodistill.hosts.llava.templates import prepare_tokenizer, use_template
    from miniature.tokenizer import train_tokenizer

    train_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), model_max_length=2048, padding_side="right")
    prepare_tokenizer(tokenizer, use_template("qwen_1_5"))
    return tokenizer


def make_processor() -> Any:
    """That of SigLIP so400m at 384 x 384, which needs no weights."""
    from transformers import SiglipImageProcessor

    processor = SiglipImageProcessor(size={"height": PIXELS, "width": PIXELS})
    processor.crop_size = {"height": PIXELS, "width": PIXELS}
    return processor


def parts(
    names: list[str], processor: Any, table: Any, datasets: dict[str, Any], collate: Callable[[list], Any]
) -> dict[str, Callable[[], Any]]:
    """What is timed, each over all images."""
    pad = import_llava("llava.mm_utils").expand2square
    square = [pad(open_rgb(name), (127, 127, 127)) for name in names]
    size = (PIXELS, PIXELS)
    samples = [datasets["processor"][number] for number in range(BATCH)]
    starts = range(0, len(names), BATCH)

    def each(function: Callable[[Any], Any], items: Any) -> Callable[[], Any]:
        return lambda: [function(item) for item in items]

    def whole(dataset: Any) -> Callable[[], Any]:
        return each(lambda start: collate([dataset[start + place] for place in range(BATCH)]), starts)

    found = {
        "open and decode": each(open_rgb, names),
        "resize (PIL)": each(lambda image: image.resize(size, Image.Resampling.BICUBIC), square),
    }
    for name, made in (("processor", processor), ("table", table)):
        if made is not None:
            preprocess = functools.partial(made.preprocess, return_tensors="pt")
            found[f"resize and normalise, {name}"] = each(preprocess, square)
    found["text"] = each(datasets["processor"].read_text, range(len(names)))
    found["collate"] = each(lambda _: collate(samples), starts)
    return found | {f"sample, {name}": whole(dataset) for name, dataset in datasets.items()}


def run(folder: str, seconds: float) -> Iterator[dict[str, Any]]:
    register(train=True)
    tokenizer, processor = read_tokenizer(Path(folder) / "tokenizer"), make_processor()
    table = quick(processor)
    table = table if isinstance(table, TablePixels) else None
    collate, threads = make_collator(tokenizer), torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        for size in SIZES:
            place = Path(folder) / f"{size[0]}x{size[1]}"
            yield from measure(place, size, tokenizer, processor, table, collate, seconds)
    finally:
        torch.set_num_threads(threads)


def measure(
    folder: Path, size: tuple[int, int], tokenizer: Any, processor: Any, table: Any, collate: Any, seconds: float
) -> Iterator[dict[str, Any]]:
    """The rows of one size of images."""
    names = make_data(folder, size)
    datasets = {"processor": make_dataset(folder, tokenizer, processor)}
    same = ""
    if table is not None:  # else the processor's resizing is not PIL's
        table.round_to(DTYPE)
        datasets["table"] = make_dataset(folder, tokenizer, table)
        pixels = ([dataset[number]["image"].to(DTYPE) for number in range(BATCH)] for dataset in datasets.values())
        same = "equal" if all(map(torch.equal, *pixels)) else "FAILED"
    work = parts(names, processor, table, datasets, collate)
    times = compare(work, torch.device("cpu"), seconds, clock=time.process_time)
    files, common = f"{size[0]} x {size[1]}", {"suite": "loader", "rows": COUNT, "dtype": "bfloat16"}
    for name, cost in times.items():
        low, median, high = (value / COUNT for value in cost)
        row = {**common, "variant": name, "p20_ms": low, "p50_ms": median, "p80_ms": high}
        row |= {"samples_per_s": 1e3 / median, "note": f"{files}; one core"}
        yield {**row, "parity": same if "table" in name else ""}
    for name in datasets:
        rate = 1e3 * COUNT / times[f"sample, {name}"][1]
        needed = ", ".join(f"{workers(wanted, rate)} for {wanted}" for wanted in RATES)
        row = {**common, "variant": f"workers, {name}", "samples_per_s": rate}
        yield {**row, "note": f"{files}; workers for samples a second: {needed}"}


def workers(wanted: float, rate: float) -> int:
    """Workers that give `wanted` samples a second, of which one core makes `rate`."""
    return max(1, math.ceil(wanted / rate))
