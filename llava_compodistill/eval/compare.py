"""`llava-compodistill compare`: models side by side, with bootstrap intervals and paired significance."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from ..errors import DataError
from .benchmarks import get, registered
from .benchmarks.sums import Sums
from .pins import differences
from .records import read_records, scoring
from .summaries import read_summary

console = Console()
#: Samples drawn at a time, which bounds the memory.
_AT_ONCE = 100


def bootstrap(models: Sequence[Sums], samples: int, seed: int = 0) -> np.ndarray:
    """[models, samples]: headlines on units drawn with replacement within each stratum, the same ones for every model.

    To scipy each stratum is a sample of its own, which it resamples by itself; what it draws are the units' numbers.
    """
    strata = models[0].by_stratum()
    # A stratum of one unit cannot vary, and scipy refuses it.
    varying = [units for units in strata if len(units) > 1]
    if not varying:
        return np.stack([np.full(samples, model.headline()) for model in models])

    def headlines(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        following = iter(drawn)
        units = [next(following) if len(stratum) > 1 else stratum for stratum in strata]
        return np.stack([model.headline(units) for model in models])

    result = stats.bootstrap(
        varying, headlines, n_resamples=samples, batch=_AT_ONCE, method="percentile", rng=np.random.default_rng(seed)
    )
    return result.bootstrap_distribution


def paired_p(first: Sums, second: Sums, samples: int, seed: int = 0) -> float:
    """Two-sided p of a difference of headlines, by scipy's permutation test: were the models alike, what one made of a
    unit might as well be what the other made of it. Swapping them keeps the strata and the pairs."""
    count, strata = len(first.strata), first.by_stratum()
    both = replace(first, columns=np.concatenate([first.columns, second.columns]))  # unit n's rows: n and count + n

    def difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return both.headline([b[..., units] for units in strata]) - both.headline([a[..., units] for units in strata])

    result = stats.permutation_test(
        (np.arange(count), np.arange(count, 2 * count)), difference, permutation_type="samples", vectorized=True,
        n_resamples=samples, batch=_AT_ONCE, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)


def compare(
    summaries: Sequence[Path], samples: int = 2000, seed: int = 0, anyway: bool = False
) -> list[dict[str, Any]]:
    """Compare one benchmark's summaries; their records lie beside them.

    Args:
        anyway: go on where they were made in different ways (`pins`), and say in what they `differ`.

    Returns:
        For each, in order: name, value, `low` and `high` (95 %), and against the first `difference`, its interval and
        `p` (two-sided, paired).

    Raises:
        DataError: for summaries of other questions.
        RecordsError: for records that are not theirs.
    """
    loaded = [read_summary(path) for path in summaries]
    first = loaded[0]
    benchmark = get(first["benchmark"])
    for path, summary in zip(summaries, loaded, strict=True):
        if benchmark.sums is None or summary["value"] is None:
            raise DataError(f"{path}: has no score that was counted from records.")
    for path, summary in zip(summaries, loaded, strict=True):
        if summary["fingerprint"] != first["fingerprint"]:
            raise DataError(f"{path} is about other questions than {summaries[0]}: they cannot be compared.")
    apart = [[], *(differences(first.get("pins"), summary.get("pins")) for summary in loaded[1:])]
    for path, differ in zip(summaries, apart, strict=True):
        if differ and not anyway:
            raise DataError(
                f"{path} and {summaries[0]} were not made in the same way: {'; '.join(differ)}. --anyway compares "
                "them and marks the difference."
            )
    models = []
    for path, summary in zip(summaries, loaded, strict=True):
        records = read_records(path.with_suffix(".jsonl"))
        if len(records) != summary["items"]:
            raise DataError(f"{path.with_suffix('.jsonl')} has {len(records)} records of {summary['items']}.")
        with scoring(path.with_suffix(".jsonl"), benchmark.title):
            models.append(benchmark.sums(sorted(records, key=lambda record: str(record["id"]))))
            whole = float(models[-1].headline())
        shapes = {(model.columns.shape, len(np.unique(model.strata))) for model in (models[0], models[-1])}
        if len(shapes) > 1:
            raise DataError(
                f"{path.with_suffix('.jsonl')}: its records belong to other groups of items (subsets, categories, "
                f"lists) than those beside {summaries[0]}, though the questions are said to be the same: one of the "
                "two has been changed. `eval --overwrite` makes it anew."
            )
        if abs(whole - summary["value"]) > 1e-6:
            raise DataError(
                f"{path}: its records give {whole:.4f}, not {summary['value']:.4f}: summary and records do not belong "
                "together."
            )
    drawn = bootstrap(models, samples, seed)
    results = []
    for number, (path, summary) in enumerate(zip(summaries, loaded, strict=True)):
        low, high = np.percentile(drawn[number], [2.5, 97.5])
        result = {"benchmark": summary["benchmark"], "headline": summary["headline"], "protocol": summary["protocol"]}
        result |= {"summary": str(path), "model": summary["model"], "value": summary["value"]}
        result |= {"low": float(low), "high": float(high), "differ": apart[number]}
        if number:
            low, high = np.percentile(drawn[number] - drawn[0], [2.5, 97.5])
            p = paired_p(models[0], models[number], samples, seed)
            result |= {"difference": summary["value"] - first["value"]}
            result |= {"difference_low": float(low), "difference_high": float(high), "p": p}
        results.append(result)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llava-compodistill compare", description=__doc__)
    parser.add_argument(
        "summaries", nargs="+", type=Path, help="summaries of `eval` (NAME.json), its output folders, or checkpoints"
    )
    parser.add_argument(
        "--samples", type=int, default=2000, help="of the bootstrap and the permutation test (default: %(default)s)"
    )
    parser.add_argument(
        "--anyway", action="store_true", help="compare summaries that were made in different ways, and say in what"
    )
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), help="bar chart (default: %(default)s)")
    args = parser.parse_args(argv)
    groups = grouped(args.summaries)
    compared = {name: compare(paths, args.samples, anyway=args.anyway) for name, paths in groups.items()}
    names = short_names([Path(result["summary"]) for result in next(iter(compared.values()))])
    console.print(table(compared, names))
    for rows in compared.values():
        for row, name in zip(rows, names, strict=True):
            if row["differ"]:
                text = f"* {get(row['benchmark']).title}, {name}: not made in the same way as {names[0]}: "
                console.print(text + "; ".join(row["differ"]), markup=False, soft_wrap=True)
    draw(compared, names, args.output)
    console.print(f"picture: {args.output}")
    return 0


def grouped(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Benchmark -> summaries, one of each model, for the benchmarks that all of them have.

    Raises:
        DataError: when there is nothing that all have.
    """
    by_model: list[dict[str, Path]] = []
    for path in paths:
        inside = path / "eval" if (path / "eval").is_dir() else path  # a checkpoint's folder
        files = [path] if path.is_file() else [inside / f"{name}.json" for name in registered()]
        files = [file for file in files if file.is_file()]
        if not files:
            raise DataError(f"{path}: no summary of `llava-compodistill eval` there.")
        summaries = {file: read_summary(file) for file in files}
        # Without labels on this machine there is nothing to draw items of.
        counted = {
            s["benchmark"]: file for file, s in summaries.items() if s["figures"].get(s["headline"]) is not None
        }
        if not counted:
            raise DataError(f"{path}: has no score that was counted from records.")
        by_model.append(counted)
    shared = [name for name in registered() if all(name in files for files in by_model)]
    if not shared:
        held = "; ".join(f"{path}: {', '.join(files)}" for path, files in zip(paths, by_model, strict=True))
        raise DataError(f"no benchmark is common to all models ({held}).")
    return {name: [files[name] for files in by_model] for name in shared}


def short_names(paths: Sequence[Path]) -> list[str]:
    """The part of each path that tells them apart, without the folders that all end with."""
    folders = [path.resolve().parent.parts for path in paths]
    while len(set(folders)) > 1 and len({folder[-1] for folder in folders}) == 1:
        folders = [folder[:-1] for folder in folders]
    for depth in range(1, max(map(len, folders)) + 1):
        names = ["/".join(folder[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def table(compared: dict[str, list[dict[str, Any]]], names: Sequence[str]) -> Table:
    plain = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 0, 0, 1), "title_justify": "left"}
    result = Table(title="in %, with 95 % intervals; differences to the first model, paired", **plain)
    result.add_column("benchmark", no_wrap=True)
    result.add_column("model", overflow="fold")
    for column in ("%", "difference", "p"):
        result.add_column(column, justify="right", no_wrap=True)
    for benchmark, rows in compared.items():
        for number, (row, name) in enumerate(zip(rows, names, strict=True)):
            cells = [get(benchmark).title if not number else "", name + ("*" if row["differ"] else "")]
            cells.append(f"{row['value']:.1f} [{row['low']:.1f}, {row['high']:.1f}]")
            if number:
                around = f"[{row['difference_low']:.1f}, {row['difference_high']:.1f}]"
                cells += [f"{row['difference']:+.1f} {around}", f"{row['p']:.3f}" if row["p"] >= 0.001 else "<0.001"]
            result.add_row(*(escape(cell) for cell in cells), end_section=number == len(rows) - 1)
    return result


def draw(compared: dict[str, list[dict[str, Any]]], names: Sequence[str], path: Path) -> None:
    """Grouped bars with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = 0.8 / len(names)
    figure, axis = plt.subplots(figsize=(2 + 1.5 * len(compared) * max(1, len(names) / 3), 4), layout="constrained")
    for number, name in enumerate(names):
        rows = [results[number] for results in compared.values()]
        places = np.arange(len(rows)) + (number - (len(names) - 1) / 2) * width
        values = np.array([row["value"] for row in rows])
        around = [values - [row["low"] for row in rows], [row["high"] for row in rows] - values]
        axis.bar(places, values, width * 0.92, yerr=np.maximum(around, 0), label=name, capsize=3, ecolor="#444444")
        for place, row in zip(places, rows, strict=True):
            axis.text(place, row["high"] + 1, f"{row['value']:.1f}", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(compared)), [get(benchmark).title for benchmark in compared])
    axis.set_ylabel("%, with 95 % intervals")
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 20))
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(names), 4), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
