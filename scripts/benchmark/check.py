"""How long `llava-compodistill check` reads a manifest of LLaVA's size, without decoding images."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from miniature import weights

#: Image files, to which the records point in turn: each is looked for, and the disk is spared 600,000 of them.
FILES = 20_000
WORDS = "what is the colour of that thing which lies left right above below a small large red blue box cone".split()


def write(folder: Path, count: int) -> Path:
    """A manifest in LLaVA's form: two turns in the mean, some 240 words, a tenth of the samples without an image."""
    draw = random.Random(0)
    images = folder / "images"
    images.mkdir(parents=True)
    first = images / "0.png"
    Image.new("RGB", (56, 56)).save(first)
    for number in range(1, min(FILES, count)):
        os.link(first, images / f"{number}.png")
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(10, 110))) for _ in range(997)]
    path = folder / "data.json"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns: list[dict[str, str]] = []
            for turn in range(draw.randint(1, 3)):
                marker = "<image>\n" if turn == 0 and number % 10 else ""
                turns.append({"from": "human", "value": f"{marker}{texts[number % 997][:60]}?"})
                turns.append({"from": "gpt", "value": texts[(number * 7 + turn) % 997]})
            image = {"image": f"{number % min(FILES, count)}.png"} if number % 10 else {}
            record = {"id": str(number), **image, "conversations": turns}
            file.write(("[" if number == 0 else ",") + json.dumps(record))
        file.write("]")
    return path


def run(folder: str, count: int) -> Iterator[dict[str, Any]]:
    """Suite check: seconds, CPU seconds and peak memory of the whole command, with the lengths of 100,000 samples."""
    root = Path(folder)
    data = write(root, count)
    weights.install(root / "models")
    command = [sys.executable, "-m", "llava_compodistill.cli", "check", "--json", str(root / "report.json")]
    command += ["--stage", "sft", "--version", "qwen_qa", "--data_path", str(data), "--bf16", "False"]
    command += ["--image_folder", str(root / "images"), "--model_name_or_path", str(root / "models" / "qwen-student")]
    command += ["--vision_tower", str(root / "models" / "siglip"), "--mm_projector_type", "mlp2x_gelu"]
    command += ["--output_dir", str(root / "out"), "--use_cpu", "True", "--report_to", "none"]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds, cpu = time.monotonic() - began, used.ru_utime + used.ru_stime
    code = os.waitstatus_to_exitcode(status)
    if code == 2 or not (root / "report.json").is_file():
        raise SystemExit(f"check ended with status {code}:\n{printed[-3000:]}")
    yield {
        "suite": "check",
        "variant": "lengths of 100,000",
        "note": f"{count:,} records of {data.stat().st_size / 2**20:,.0f} MiB; CPU {cpu:.1f} s; status {code}",
        "p50_ms": 1e3 * seconds,
        "extra_mib": used.ru_maxrss / 2**10,
        "samples_per_s": count / seconds,
    }
