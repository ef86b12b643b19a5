"""`llava-compodistill analyze similarity|probability|intervention|knockout|overlay`: the paper's figures of attention
from checkpoints and samples, as PNG and JSON."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..about import environment
from ..errors import DataError
from ..eval.checkpoint import check_checkpoint, template_of
from ..pair.layers import parse_band, visual_understanding_layers
from .samples import CAPTION_PROMPT, Sample, read_samples, thinned

console = Console()

ANALYSES = {
    "similarity": "the answer's attention over visual and text tokens, by layer, beside the teacher's (Fig. 2, 9)",
    "probability": "the right answer's probability against the similarity of attention (Fig. 3)",
    "intervention": "accuracy with the mean of the teacher's and the student's attention over the image (Fig. 4)",
    "knockout": "what is lost when text does not see the image in one layer",
    "overlay": "where a phrase looks in the image (Fig. 1b, 6, 7)",
}


def build_parser() -> argparse.ArgumentParser:
    table = "\n".join(f"  {name:<13} {text}" for name, text in ANALYSES.items())
    parser = argparse.ArgumentParser(
        prog="llava-compodistill analyze",
        description="Compare where models look. The first checkpoint is the teacher, except for knockout.",
        epilog=f"analyses:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("analysis", choices=ANALYSES, metavar="ANALYSIS", help="one of the analyses below")
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="LLaVA checkpoints, the teacher first")
    parser.add_argument(
        "--data", action="append", required=True, metavar="FILE|BENCHMARK",
        help="LLaVA's JSON, .jsonl of image, text, answer, or a benchmark's name (repeatable for similarity)",
    )  # fmt: skip
    parser.add_argument("--names", default=None, help="labels of the checkpoints, comma-separated (parts of paths)")
    parser.add_argument("--images", default="", help="folder that the image names of a file begin in")
    parser.add_argument("--data-root", type=Path, default=None, help="folder of the benchmarks' files")
    parser.add_argument(
        "--output", type=Path, default=Path("analysis"), help="folder of PNG and JSON (default: analysis)"
    )
    parser.add_argument("--limit", type=int, default=500, help="samples, evenly from all over; 0 takes all (500)")
    parser.add_argument("--band", default="intermediate", help="layers that count, as --student_layers (intermediate)")
    parser.add_argument("--bins", type=int, default=10, help="bins of probability (10)")
    parser.add_argument("--share", type=float, default=0.5, help="of the teacher's attention in an intervention (0.5)")
    parser.add_argument("--phrase", default=None, help="of overlay: words of prompt or answer (the whole answer)")
    parser.add_argument("--items", type=int, default=3, help="rows of an overlay (3)")
    parser.add_argument("--conv-mode", default=None, help="conversation template (each checkpoint's own)")
    parser.add_argument("--caption-prompt", default=CAPTION_PROMPT, help="what is asked where captions are matched")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default=None, help="cuda, cuda:N or cpu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`llava-compodistill analyze`."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.analysis != "knockout" and len(args.checkpoints) < 2:
        parser.error(f"{args.analysis} compares models with a teacher: name the teacher, then one checkpoint or more.")
    if args.analysis != "similarity" and len(args.data) > 1:
        parser.error("--data can be repeated for similarity alone.")
    if not 0 < args.share <= 1:
        parser.error(f"--share {args.share}: must be above 0 and at most 1.")
    try:
        band = parse_band(args.band, "band")
    except ValueError as error:
        parser.error(str(error))
    for checkpoint in args.checkpoints:
        check_checkpoint(checkpoint)
    sources = {
        _name(source): thinned(read_samples(source, args.images, args.data_root, args.caption_prompt), args.limit)
        for source in args.data
    }
    names = _names(args.checkpoints, args.names)
    templates = _templates(dict(zip(names, args.checkpoints, strict=True)), args)
    engines = {name: _load(path, templates[name], args) for name, path in zip(names, args.checkpoints, strict=True)}
    picture, found = _RUN[args.analysis](engines, sources, band, args)
    record = {
        "analysis": args.analysis,
        "checkpoints": dict(zip(names, map(str, args.checkpoints), strict=True)),
        "data": {name: len(samples) for name, samples in sources.items()},
        "settings": {
            name: str(value) for name, value in vars(args).items() if name not in ("analysis", "checkpoints")
        },
        "environment": environment(),
        "found": found,
    }
    path = picture.with_suffix(".json")
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"picture: {picture}\nfigures: {path}", soft_wrap=True)
    return 0


def _name(source: str) -> str:
    return Path(source).stem if Path(source).suffix else source


def _names(checkpoints: Sequence[str], given: str | None = None) -> list[str]:
    """What each checkpoint is called: the last part of its path that tells it from the others, or what is given.

    Raises:
        DataError: for a checkpoint that is there twice, and for names that are not one for each.
    """
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        if len(set(names)) != len(checkpoints) or len(names) != len(checkpoints):
            raise DataError(f"--names {given}: there must be {len(checkpoints)} different names, one a checkpoint.")
        return names
    parts = [Path(os.path.abspath(checkpoint)).parts for checkpoint in checkpoints]
    found = []
    for place, mine in enumerate(parts):
        others = {part for other in (*parts[:place], *parts[place + 1 :]) for part in other}
        own = [part for part in mine if part not in others]
        found.append(own[-1] if own else "/".join(mine))
    if len(set(parts)) < len(parts):
        raise DataError(f"a checkpoint is named twice: {', '.join(map(str, checkpoints))}.")
    return found


def _templates(checkpoints: dict[str, str], args: argparse.Namespace) -> dict[str, str]:
    """The conversation template of each checkpoint.

    Raises:
        DataError: where models are compared token by token, and read other prompts.
    """
    found = {
        name: args.conv_mode or template_of(path, lambda text: console.print(text, soft_wrap=True))
        for name, path in checkpoints.items()
    }
    if args.analysis in _COMPARE and len(set(found.values())) > 1:
        listed = ", ".join(f"{name}: {template}" for name, template in found.items())
        raise DataError(
            f"The checkpoints have different conversation templates ({listed}), so their tokens stand at different "
            "places: --conv-mode names one for all."
        )
    return found


def _load(path: str, template: str, args: argparse.Namespace) -> Any:
    from ..eval.loading import load_engine

    with console.status(f"loading {path}"):
        return load_engine(path, template, device=args.device, batch_size=args.batch_size)


def _relative(band: Any, depth: int) -> tuple[float, float]:
    layers = visual_understanding_layers(depth, band)
    return layers[0] / depth, (layers[-1] + 1) / depth


def _similarity(engines: dict[str, Any], sources: dict[str, list[Sample]], band: Any, args: Any) -> tuple[Path, Any]:
    from .answers import KEYS
    from .experiments import Mean, depth_of, similarity_by_layer
    from .plots import draw_similarity

    reference, *others = engines
    curves: dict[tuple[str, str], dict[str, list[Mean]]] = {}
    panels = [(name, keys, other) for name in sources for keys in KEYS for other in others]
    for name, keys, other in track(panels, "comparing", console=console, transient=True):
        values = similarity_by_layer(engines[reference], engines[other], sources[name], keys, args.batch_size)
        curves.setdefault((name, keys), {})[other] = [Mean.of(layer) for layer in zip(*values, strict=True)]
    shown = _relative(band, depth_of(engines[others[0]]))
    path = draw_similarity(curves, reference, shown, args.output / "similarity.png")
    found = [
        {"data": name, "keys": keys, "model": model, "layers": [asdict(layer) for layer in layers]}
        for (name, keys), models in curves.items()
        for model, layers in models.items()
    ]
    return path, found


def _probability(engines: dict[str, Any], sources: dict[str, list[Sample]], band: Any, args: Any) -> tuple[Path, Any]:
    from .experiments import answer_scores, depth_of, probability_by_similarity, similarity_by_layer
    from .plots import draw_probability

    reference, *others = engines
    (samples,) = sources.values()
    bins = {}
    for other in track(others, "comparing", console=console, transient=True):
        layers = visual_understanding_layers(depth_of(engines[other]), band)
        values = similarity_by_layer(engines[reference], engines[other], samples, batch_size=args.batch_size)
        alike = [sum(sample[layer] for layer in layers) / len(layers) for sample in values]
        probabilities, _ = answer_scores(engines[other], samples, args.batch_size)
        bins[other] = probability_by_similarity(alike, probabilities, args.bins)
    path = draw_probability(bins, reference, args.output / "probability.png")
    return path, {model: asdict(found) for model, found in bins.items()}


def _intervention(engines: dict[str, Any], sources: dict[str, list[Sample]], band: Any, args: Any) -> tuple[Path, Any]:
    from .experiments import intervene
    from .plots import draw_intervention

    reference, *others = engines
    (samples,) = sources.values()
    options = {"band": band, "share": args.share, "batch_size": args.batch_size}
    found = {
        other: intervene(engines[reference], engines[other], samples, **options)
        for other in track(others, "intervening", console=console, transient=True)
    }
    path = draw_intervention(found, args.output / "intervention.png")
    return path, {model: asdict(result) for model, result in found.items()}


def _knockout(engines: dict[str, Any], sources: dict[str, list[Sample]], band: Any, args: Any) -> tuple[Path, Any]:
    from .experiments import knockout
    from .plots import draw_knockout

    (samples,) = sources.values()

    def progress(layers: Any, what: str) -> Any:
        return track(layers, what, console=console, transient=True)

    found = {model: knockout(engine, samples, args.batch_size, progress) for model, engine in engines.items()}
    path = draw_knockout(found, args.output / "knockout.png")
    names = ("accuracy", "cost")
    return path, {
        model: {
            "whole": {name: asdict(value) for name, value in zip(names, whole, strict=True)},
            "without_layer": [
                {name: asdict(value) for name, value in zip(names, layer, strict=True)} for layer in layers
            ],
        }
        for model, (whole, layers) in found.items()
    }


def _overlay(engines: dict[str, Any], sources: dict[str, list[Sample]], band: Any, args: Any) -> tuple[Path, Any]:
    from ..hosts.llava.images import open_rgb
    from .experiments import depth_of
    from .overlay import phrase_attention
    from .plots import draw_overlays

    (samples,) = sources.values()
    if args.phrase is not None:
        samples = [sample for sample in samples if args.phrase in f"{sample.prompt}\n{sample.answer}"]
        if not samples:
            raise DataError(f"--phrase {args.phrase!r}: no prompt or answer of --data holds it.")
    rows, found = [], []
    for sample in thinned(samples, args.items):
        phrase = args.phrase or sample.answer
        looks = {
            model: phrase_attention(engine, sample, phrase, visual_understanding_layers(depth_of(engine), band))
            for model, engine in engines.items()
        }
        of = "the answer" if args.phrase is None else f"“{phrase}”"
        title = f"{sample.prompt}\nAnswer: {sample.answer}\nAttention of {of}"
        rows.append((title, open_rgb(sample.image), looks))
        looked = {model: look.tolist() for model, look in looks.items()}
        found.append({"image": sample.image, "phrase": phrase, "attention": looked})
    return draw_overlays(rows, next(iter(engines)), args.output / "overlay.png"), found


#: Analyses that compare models token by token.
_COMPARE = ("similarity", "probability", "intervention")

_RUN: dict[str, Callable[..., tuple[Path, Any]]] = {
    "similarity": _similarity,
    "probability": _probability,
    "intervention": _intervention,
    "knockout": _knockout,
    "overlay": _overlay,
}
