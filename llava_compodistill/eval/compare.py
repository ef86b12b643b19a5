"""`llava-compodistill compare`: models side by side, with bootstrap intervals and paired significance."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import DataError
from .reading import yes_or_no
from .records import read_records
from .scorers import MME_PERCEPTION, REEFKNOT_TASKS, image_values, item_value
from .summaries import EVERY, read_summary

console = Console()
_AT_ONCE = 200


@dataclass
class Parts:
    """A headline as a function of sums over items, so that resampling needs no scorer.

    Attributes:
        strata: [N], which group an item is drawn within (a subset, a category, a task).
        columns: [N, K], what is summed.
        value: sums [..., S, K] over the S strata -> figures [...], in %.
    """

    strata: np.ndarray
    columns: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]

    def sums(self, counts: np.ndarray) -> np.ndarray:
        """[R, N] times an item is drawn -> [R, S, K]."""
        groups = np.unique(self.strata)
        return np.stack([counts[:, self.strata == g] @ self.columns[self.strata == g] for g in groups], axis=1)


def parts(benchmark: str, records: Sequence[dict[str, Any]]) -> Parts:
    """What a benchmark's headline is made of."""
    if benchmark == "rbench":
        return _mean_f1(
            records, [(record["label"], "") for record in records], [record["lists"] for record in records]
        )
    if benchmark == "pope":
        strata = [(record["label"], record["category"]) for record in records]
        return _mean_f1(records, strata, [[record["category"]] for record in records])
    if benchmark == "mme":
        return _mme(records)
    field = {"sugarcrepe": "subset", "sade": "category", "reefknot": "task"}.get(benchmark)
    names = [record[field] if field else "" for record in records]
    values = np.array([item_value(benchmark, record) for record in records])
    columns = np.stack([values, np.ones(len(values))], axis=1)
    return Parts(_numbered(names), columns, lambda sums: 100 * (sums[..., 0] / sums[..., 1]).mean(axis=-1))


def _mean_f1(
    records: Sequence[dict[str, Any]], strata: Sequence[tuple[str, str]], lists_of: Sequence[Sequence[Any]]
) -> Parts:
    """Of each list hits, "yes" answers and true "yes": F1 = 2 hits / (said + true). The share of true "yes" is the
    benchmark's choice, so that items are drawn within a label."""
    lists = sorted({name for names in lists_of for name in names}, key=str)
    columns = np.zeros((len(records), 3 * len(lists)))
    for row, record in enumerate(records):
        said, true = yes_or_no(record["text"]) is True, record["label"] == "yes"
        for place, name in enumerate(lists):
            if name in lists_of[row]:
                columns[row, 3 * place : 3 * place + 3] = said and true, said, true

    def value(sums: np.ndarray) -> np.ndarray:
        hits, said, true = (sums.sum(axis=-2)[..., place::3] for place in range(3))
        return 100 * (2 * hits / np.maximum(said + true, 1)).mean(axis=-1)

    return Parts(_numbered([" ".join(stratum) for stratum in strata]), columns, value)


def _mme(records: Sequence[dict[str, Any]]) -> Parts:
    """Images are drawn, not questions: both of an image's belong together."""
    images = [image for image in image_values(records) if image[0] in MME_PERCEPTION]
    columns = np.array([[right, questions, both, 1] for _, right, questions, both in images], dtype=float)

    def value(sums: np.ndarray) -> np.ndarray:
        right, questions, both, count = (sums[..., place] for place in range(4))
        return 50 * (right / questions + both / count).mean(axis=-1)

    order = {task: number for number, task in enumerate(MME_PERCEPTION)}
    return Parts(np.array([order[task] for task, *_ in images]), columns, value)


def _numbered(names: Sequence[str]) -> np.ndarray:
    order = {name: number for number, name in enumerate(dict.fromkeys([*REEFKNOT_TASKS, *names]))}
    return np.array([order[name] for name in names])


def bootstrap(models: Sequence[Parts], samples: int, seed: int = 0) -> np.ndarray:
    """[samples, models]: headlines on items drawn with replacement within each stratum, the same for each model."""
    strata = models[0].strata
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, samples, _AT_ONCE):
        size = min(_AT_ONCE, samples - start)
        counts = np.zeros((size, len(strata)))
        for group in np.unique(strata):
            inside = strata == group
            number = int(inside.sum())
            counts[:, inside] = rng.multinomial(number, np.full(number, 1 / number), size=size)
        drawn.append(np.stack([model.value(model.sums(counts)) for model in models], axis=1))
    return np.concatenate(drawn)


def compare(summaries: Sequence[Path], samples: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """Compare one benchmark's summaries; their records lie beside them.

    Returns:
        For each, in order: name, value, `low` and `high` (95 %), and against the first `difference`, its interval and
        `p` (two-sided, paired: the share of samples in which the difference has the other sign, doubled).

    Raises:
        DataError: for summaries of other questions, or records that are not theirs.
    """
    loaded = [read_summary(path) for path in summaries]
    first = loaded[0]
    for path, summary in zip(summaries, loaded, strict=True):
        if summary["fingerprint"] != first["fingerprint"]:
            raise DataError(f"{path} is about other questions than {summaries[0]}: they cannot be compared.")
        for name in ("protocol", "caption_prompt"):
            if summary.get(name) != first.get(name):
                raise DataError(
                    f"{path}: its {name} is {summary.get(name)!r}, that of {summaries[0]} {first.get(name)!r}."
                )
    models = []
    for path, summary in zip(summaries, loaded, strict=True):
        records = read_records(path.with_suffix(".jsonl"))
        if len(records) != summary["items"]:
            raise DataError(f"{path.with_suffix('.jsonl')} has {len(records)} records of {summary['items']}.")
        models.append(parts(summary["benchmark"], sorted(records, key=lambda record: str(record["id"]))))
        whole = float(models[-1].value(models[-1].sums(np.ones((1, len(models[-1].strata)))))[0])
        if abs(whole - summary["value"]) > 1e-6:
            raise DataError(f"{path}: its records give {whole:.4f}, not {summary['value']:.4f}: it is not theirs.")
    drawn = bootstrap(models, samples, seed)
    results = []
    for number, (path, summary) in enumerate(zip(summaries, loaded, strict=True)):
        low, high = np.percentile(drawn[:, number], [2.5, 97.5])
        result = {"benchmark": summary["benchmark"], "headline": summary["headline"], "protocol": summary["protocol"]}
        result |= {"summary": str(path), "model": summary["model"], "value": summary["value"]}
        result |= {"low": float(low), "high": float(high)}
        if number:
            apart = drawn[:, number] - drawn[:, 0]
            low, high = np.percentile(apart, [2.5, 97.5])
            tail = min((apart <= 0).mean(), (apart >= 0).mean())
            # With none of the samples on the other side, all that is known is that p is below one sample's worth.
            p = max(min(1.0, 2 * float(tail)), 1 / samples)
            result |= {"difference": summary["value"] - first["value"]}
            result |= {"difference_low": float(low), "difference_high": float(high), "p": p}
        results.append(result)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llava-compodistill compare", description=__doc__)
    parser.add_argument(
        "summaries", nargs="+", type=Path, help="summaries of `eval` (NAME.json), its output folders, or checkpoints"
    )
    parser.add_argument("--samples", type=int, default=2000, help="bootstrap samples (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), help="bar chart (default: %(default)s)")
    args = parser.parse_args(argv)
    groups = grouped(args.summaries)
    compared = {name: compare(paths, args.samples) for name, paths in groups.items()}
    names = short_names([Path(result["summary"]) for result in next(iter(compared.values()))])
    console.print(table(compared, names))
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
        files = [path] if path.is_file() else [inside / f"{name}.json" for name in EVERY]
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
    shared = [name for name in EVERY if all(name in files for files in by_model)]
    if not shared:
        held = "; ".join(f"{path}: {', '.join(files)}" for path, files in zip(paths, by_model, strict=True))
        raise DataError(f"no benchmark is in all of them ({held}).")
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
            cells = [EVERY[benchmark].title if not number else "", name]
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
    axis.set_xticks(range(len(compared)), [EVERY[benchmark].title for benchmark in compared])
    axis.set_ylabel("%, with 95 % intervals")
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 20))
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(names), 4), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
