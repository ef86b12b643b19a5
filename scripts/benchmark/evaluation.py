"""Suite eval: items a second of the evaluation engine against one question at a time, on the miniature.

On SugarCrepe, LLaVA's way is to generate an answer a question, image included: here the letter of the better caption,
asked in both orders. The same likelihoods one by one show what sharing images, prefixes and batches gives by itself.
On GQA, LLaVA's own module is run beside ours, which asks the same and must answer the same.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import synchronize
from PIL import Image

from llava_compodistill.eval import protocols, vqa_loader
from llava_compodistill.eval.benchmarks import get, sugarcrepe
from llava_compodistill.eval.benchmarks.base import Item
from llava_compodistill.eval.benchmarks.llava import read_answers, read_questions
from llava_compodistill.eval.engine import Engine
from llava_compodistill.eval.sequences import WholeSequences
from llava_compodistill.hosts.llava import import_llava, runner
from miniature import weights
from miniature.benchmarks import write_benchmarks
from miniature.dataset import WorldConfig, write_dataset
from miniature.evaluate import load_for_evaluation
from miniature.language import CAPTION_PROMPT
from miniature.settings import VERSION

#: Most items of a variant; slow ones stop after the time given to them.
ITEMS = 350


def run(folder: str, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    root = Path(folder)
    sizes = {"compositional": ITEMS // 7, "recognition": ITEMS // 7}  # about four questions an image
    write_dataset(root / "data", WorldConfig.preset("smoke", **sizes), progress=False)
    write_benchmarks(root / "data", root / "eval")
    weights.install(root / "models")
    model, tokenizer = load_for_evaluation(root / "models" / "llava-teacher")
    model = model.to(device)
    items = sugarcrepe.load(root / "eval")
    engine = Engine(model, tokenizer, version=VERSION, batch_size=64)
    alone = WholeSequences(model, tokenizer, version=VERSION, batch_size=1)

    def in_batches(chosen: list[Item]) -> list[dict[str, Any]]:
        asked = [protocols.requests(item, "likelihood", CAPTION_PROMPT) for item in chosen]
        responses = iter(engine.run([request for requests in asked for request in requests]))
        return [
            protocols.record(item, "likelihood", [next(responses) for _ in requests])
            for item, requests in zip(chosen, asked, strict=True)
        ]

    def one_by_one(item: Item) -> dict[str, Any]:
        return protocols.record(item, "likelihood", alone.run(protocols.requests(item, "likelihood", CAPTION_PROMPT)))

    def generated(item: Item) -> dict[str, Any]:
        answers = [
            generate(engine, request.image, request.prompt, request.max_new_tokens)
            for request in protocols.requests(item, "choice")
        ]
        return protocols.record(item, "choice", answers)

    in_batches(items[:8])
    fast, rate = timed(lambda: in_batches(items), device)
    slow: dict[str, tuple[list[dict[str, Any]], float]] = {}
    for name, ask in (("one by one, likelihood", one_by_one), ("one by one, generated letters", generated)):
        slow[name] = one_at_a_time(ask, items, device, seconds)
    apart = max(
        abs(a - b)
        for mine, theirs in zip(fast, slow["one by one, likelihood"][0], strict=False)
        for a, b in zip(itertools.chain(*mine["scores"]), itertools.chain(*theirs["scores"]), strict=True)
    )
    wrong = apart > (1e-4 if next(model.parameters()).dtype == torch.float32 else 2e-2)
    common = {"suite": "eval", "rows": len(items), "dtype": str(model.dtype).removeprefix("torch.")}
    for name, (records, speed) in slow.items():
        accuracy = sugarcrepe.score(records)["micro"]
        note = f"{len(records)} items, accuracy {accuracy:.1f}"
        yield {**common, "variant": name, "samples_per_s": speed, "note": note, "parity": "-"}
    done = len(slow["one by one, likelihood"][0])
    note = f"{len(fast)} items, accuracy {sugarcrepe.score(fast)['micro']:.1f}; of the first {done} "
    note += f"{sugarcrepe.score(fast[:done])['micro']:.1f}"
    row = {**common, "variant": "ours, likelihood", "note": note}
    if wrong:
        yield {**row, "parity": f"FAILED {apart:.1e}"}
    else:
        yield {**row, "parity": f"{apart:.1e}", "samples_per_s": len(fast) / rate}
    if (device.type == "cuda") == torch.cuda.is_available():  # both modules take a GPU where there is one
        yield from beside_llava(root, device, seconds)


def beside_llava(root: Path, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Questions a second of LLaVA's model_vqa_loader and of ours, in turns; loading the model does not count."""
    gqa = get("gqa")
    paths = {"--question-file": root / "eval" / gqa.questions, "--image-folder": root / "eval" / gqa.images}
    given = {**paths, "--model-path": root / "models" / "llava-teacher", "--conv-mode": VERSION, "--temperature": 0}
    flags = [str(part) for pair in given.items() for part in pair]
    questions = read_questions(paths["--question-file"])
    modules = {
        "LLaVA's model_vqa_loader": lambda flags: runner.run("llava.eval.model_vqa_loader", flags),
        "ours, the same prompts": vqa_loader.main,
    }
    rates: dict[str, list[float]] = {name: [] for name in modules}
    texts = {}
    until = time.perf_counter() + seconds
    while not texts or time.perf_counter() < until:
        for name, module in modules.items():
            answers = root / "answers" / f"{len(name)}.jsonl"
            took = after_loading(module, [*flags, "--answers-file", str(answers)], device)
            rates[name].append(len(questions) / took)
            texts[name] = [answer["text"] for answer in read_answers(answers)]
    theirs, mine = texts.values()
    apart = sum(one != other for one, other in zip(theirs, mine, strict=True)) / len(questions)
    dtype = "float16" if device.type == "cuda" else "float32"
    note = f"{len(questions)} questions on {len({question['image'] for question in questions})} images"
    for name, found in rates.items():
        parity = "-" if name != "ours, the same prompts" else f"{apart:.1e}" if apart < 0.01 else f"FAILED {apart:.1e}"
        row = {"suite": "eval", "rows": len(questions), "dtype": dtype, "variant": name, "note": note}
        yield {**row, "samples_per_s": statistics.median(found), "parity": parity}


def after_loading(module: Callable[[list[str]], Any], flags: list[str], device: torch.device) -> float:
    """Seconds that a module takes once its model is there; its progress bar is not shown."""
    builder = import_llava("llava.model.builder")
    load, ready = builder.load_pretrained_model, []

    def noting(*args: Any, **options: Any) -> Any:
        loaded = load(*args, **options)
        synchronize(device)
        ready.append(time.perf_counter())
        return loaded

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(builder, "load_pretrained_model", noting))
        for layer in (torch.nn.Linear, torch.nn.LayerNorm):  # LLaVA's module switches these off, and for good
            stack.enter_context(mock.patch.object(layer, "reset_parameters", layer.reset_parameters))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        module(flags)
    synchronize(device)
    return time.perf_counter() - ready[0]


def timed(call, device: torch.device) -> tuple[Any, float]:
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - started


def one_at_a_time(ask, items: list[Item], device: torch.device, seconds: float):
    """(records, items a second) of as many items as the time allows, in order."""
    ask(items[0])
    records, spent = [], 0.0
    for item in items:
        record, took = timed(lambda item=item: ask(item), device)
        records.append(record)
        spent += took
        if spent > seconds and len(records) >= 5:
            break
    return records, len(records) / spent


def generate(engine: Engine, image: str, prompt: str, limit: int) -> str:
    """As llava.eval.model_vqa_loader does: the whole prompt with its image, one question a call."""
    conv_templates = import_llava("llava.conversation").conv_templates
    mm_utils = import_llava("llava.mm_utils")
    model, tokenizer = engine.model, engine.tokenizer
    conversation = conv_templates[engine.version].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{prompt}")
    conversation.append_message(conversation.roles[1], None)
    ids = mm_utils.tokenizer_image_token(conversation.get_prompt(), tokenizer, -200, return_tensors="pt")[None]
    with Image.open(image) as picture:
        pixels = mm_utils.process_images(
            [picture.convert("RGB")], model.get_vision_tower().image_processor, model.config
        )
    with torch.inference_mode():
        tokens = model.generate(
            ids.to(model.device),
            images=pixels.to(model.device, model.dtype),
            do_sample=False,
            max_new_tokens=limit,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()
