"""`llava-compodistill eval`: ask a model a benchmark's questions, score the answers, print them beside the paper's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import protocols
from .formats import DataError
from .suite import BENCHMARKS, PAPER_MODELS, protocol_for, run_benchmark

console = Console()
#: `PAPER_MODELS` in a table's head.
SHORT = ("teacher", "SFT", "CompoD.")
#: Conversation template of a model type, where --conv-mode is not given.
TEMPLATES = {"llava_qwen2": "qwen_1_5", "llava_llama": "v1", "llava": "v1", "llava_mistral": "mistral_instruct"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-compodistill eval", description=__doc__)
    parser.add_argument("--model-path", required=True, help="checkpoint folder")
    parser.add_argument("--model-base", help="base model of a LoRA checkpoint")
    parser.add_argument("--benchmarks", default="all", help=f"all, or some of {','.join(BENCHMARKS)}")
    parser.add_argument("--data-root", type=Path, default=Path("playground/data/eval"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder of records and summaries (default: MODEL/eval)")
    parser.add_argument(
        "--protocol",
        choices=(*protocols.CHOOSING, *protocols.MATCHING),
        help="how captions are matched with images (default: each benchmark's first)",
    )
    parser.add_argument("--conv-mode", help="conversation template (default: by the model's type)")
    parser.add_argument("--caption-prompt", default=protocols.CAPTION_PROMPT, help="of the likelihood protocol")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda")
    parser.add_argument("--overwrite", action="store_true", help="ask again what was answered already")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    names = list(BENCHMARKS) if args.benchmarks == "all" else args.benchmarks.split(",")
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        console.print(
            f"--benchmarks {args.benchmarks}: unknown {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}."
        )
        return 2
    output = args.output or Path(args.model_path) / "eval"
    # Everything is read and checked before the model is: a missing image shows now, not after hours.
    items, missing = {}, {}
    for name in names:
        try:
            protocol_for(BENCHMARKS[name], args.protocol)
            items[name] = BENCHMARKS[name].load(args.data_root)
        except DataError as error:
            if args.benchmarks != "all":
                raise
            missing[name] = str(error)
        except ValueError as error:
            if args.benchmarks != "all":
                console.print(str(error), markup=False)
                return 2
            missing[name] = str(error)
    for text in missing.values():
        console.print(f"left out: {text}", markup=False)
    if not items:
        return 2
    model, engine = load(args)
    summaries = []
    for name, asked in items.items():
        with progress() as bars:
            bar = bars.add_task(BENCHMARKS[name].title, total=len(asked))
            summary = run_benchmark(
                BENCHMARKS[name],
                asked,
                engine,
                str(args.model_path),
                output,
                protocol=args.protocol,
                caption_prompt=args.caption_prompt,
                overwrite=args.overwrite,
                progress=lambda count, bar=bar, bars=bars: bars.advance(bar, count),
            )
        summaries.append(summary)
        rate = summary["asked"] / max(summary["seconds"], 1e-9)
        console.print(
            f"{summary['asked']} of {summary['items']} items in {summary['seconds']:.0f} s ({rate:.1f} a second): "
            f"{output / (name + '.json')}"
        )
    console.print(table(summaries, model))
    return 0


def load(args: argparse.Namespace) -> tuple[str, Any]:
    """(the model's short name, an engine for it), through the plugin's loader."""
    import torch
    from transformers.utils import logging as transformers_logging

    from ..plugin import import_llava, register
    from .engine import Engine

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    register(train=True)
    name = Path(args.model_path).name
    loader = import_llava("llava.model.builder").load_pretrained_model
    with console.status(f"loading {args.model_path}"):
        tokenizer, model, _, _ = loader(args.model_path, args.model_base, name, device=device, torch_dtype=dtype)
    version = args.conv_mode
    if version is None:
        kind = model.config.model_type
        version = TEMPLATES.get(kind, "v1")
        console.print(f"--conv-mode {version}, for a {kind}")
    return name, Engine(model.eval(), tokenizer, version=version, batch_size=args.batch_size)


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def table(summaries: Sequence[dict[str, Any]], name: str) -> Table:
    """The model's figures beside the paper's; the average where all four of the paper's are there."""
    plain = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 0, 0, 1), "title_justify": "left"}
    result = Table(title=f"{name}: scores in %, beside the paper's at full size (arXiv 2510.12184)", **plain)
    for column in ("benchmark", "figure", "protocol"):
        result.add_column(column, no_wrap=True)
    for column in ("here", *(f"paper:\n{model}" for model in SHORT)):
        result.add_column(column, justify="right", no_wrap=True)
    averaged: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        benchmark = BENCHMARKS[summary["benchmark"]]
        paper = [f"{value:.1f}" for value in summary["paper"].values()]
        result.add_row(benchmark.title, summary["headline"], summary["protocol"], percent(summary["value"]), *paper)
        if benchmark.averaged:
            averaged[benchmark.name] = summary
    if len(averaged) == sum(benchmark.averaged for benchmark in BENCHMARKS.values()):
        values = [summary["value"] for summary in averaged.values()]
        papers = [mean(summary["paper"][model] for summary in averaged.values()) for model in PAPER_MODELS]
        result.add_section()
        result.add_row("CR average", "", "", percent(mean(values)), *(f"{value:.1f}" for value in papers))
    return result


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def read_summary(path: Path) -> dict[str, Any]:
    """A summary that `eval` wrote.

    Raises:
        DataError: for a file that is none.
    """
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        summary["benchmark"], summary["figures"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no summary of `llava-compodistill eval` ({error}).") from None
    return summary
