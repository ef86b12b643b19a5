"""Pictures of a benchmark's CSV: python scripts/benchmark/plot.py benchmark.csv [--output FOLDER]

One PNG a suite: time and memory of each variant, as bars over the sizes that were measured.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

#: suite -> (columns that tell one size from another, with their short names), figures
SUITES = {
    "op": (
        {"batch": "B", "heads": "H", "kv_heads": "kv", "length": "N", "visual": "N_v", "head_size": "d", "note": ""},
        ["p50_ms", "extra_mib"],
    ),
    "head": ({"length": "positions", "rows": "rows", "vocab": "V", "note": ""}, ["p50_ms", "extra_mib"]),
    "step": ({"batch": "B", "length": "N"}, ["p50_ms", "extra_mib"]),
    "compile": ({"batch": "B", "length": "N"}, ["p50_ms", "extra_mib"]),
    "fit": ({"length": "N", "limit": ""}, ["batch", "samples_per_s"]),
}
AXES = {
    "p50_ms": "milliseconds (median; whiskers: 20th and 80th percentile)",
    "extra_mib": "peak memory above the inputs, MiB",
    "batch": "largest micro-batch",
    "samples_per_s": "samples per second at the best micro-batch",
}
COLORS = {
    "eager": "#9aa0a6",
    "usual": "#9aa0a6",
    "all positions": "#9aa0a6",
    "answer rows": "#d9a441",
    "KD only": "#d9a441",
    "chunked": "#2f7fb5",
    "liger": "#7d5ba6",
    "triton": "#c2453a",
    "ours": "#c2453a",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="plot.py"
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--output", type=Path, help="folder of the pictures (default: beside the CSV)")
    args = parser.parse_args()
    try:
        rows = list(csv.DictReader(args.csv.open(encoding="utf-8")))
    except OSError as error:
        raise SystemExit(f"{args.csv}: {error.strerror}. scripts/benchmark/run.py --output writes one.") from None
    if not rows or "suite" not in rows[0]:
        raise SystemExit(f"{args.csv}: no rows of scripts/benchmark/run.py in it.")
    folder = args.output or args.csv.parent
    folder.mkdir(parents=True, exist_ok=True)
    for suite in dict.fromkeys(row["suite"] for row in rows):
        if suite in SUITES:
            path = folder / f"{args.csv.stem}-{suite}.png"
            draw(suite, [row for row in rows if row["suite"] == suite], path)
            print(path)


def draw(suite: str, rows: list[dict[str, str]], path: Path) -> None:
    sizes, figures = SUITES[suite]
    for row in rows:
        row["limit"] = row.get("note", "").split(";")[0]
    groups: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    constant = {name for name in sizes if len({row[name] for row in rows}) == 1}
    for row in rows:
        label = ", ".join(f"{short} {row[name]}".strip() for name, short in sizes.items() if name not in constant)
        groups[label or " "][row["variant"]] = row
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    height = 1.2 + 0.27 * sum(len(group) + 1 for group in groups.values())
    figure, axes = plt.subplots(1, len(figures), figsize=(11, height), sharey=True, layout="constrained")
    for axis, name in zip(axes, figures, strict=True):
        position, ticks = 0.0, []
        for label, group in groups.items():
            start = position
            for variant in variants:
                if variant not in group:
                    continue
                bar(axis, position, group[variant], name, variants)
                position += 1
            ticks.append(((start + position - 1) / 2, label))
            position += 1
        axis.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks])
        axis.set_xlabel(AXES[name])
        axis.grid(axis="x", color="#e4e4e4")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, axis.get_xlim()[1] * 1.12)  # room for the numbers
    axes[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=color(variant, variants)) for variant in variants]
    figure.legend(handles, variants, loc="outside upper center", ncols=len(variants), frameon=False)
    same = ", ".join(f"{short} {rows[0][name]}".strip() for name, short in sizes.items() if name in constant)
    first = rows[0]
    where = f"{first['device']} · torch {first['torch']} · {first['dtype']} · commit {first['commit']}"
    figure.supxlabel(f"{suite}: {same}\n{where}" if same else f"{suite}\n{where}", fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def bar(axis: plt.Axes, position: float, row: dict[str, str], name: str, variants: list[str]) -> None:
    if not row.get(name) or float(row[name]) == 0:
        axis.text(
            0.02, position, row.get("note") or "-", transform=axis.get_yaxis_transform(), va="center", fontsize=8
        )
        return
    value, whiskers = float(row[name]), None
    if name == "p50_ms":
        whiskers = [[value - float(row["p20_ms"])], [float(row["p80_ms"]) - value]]
    axis.barh(position, value, color=color(row["variant"], variants), xerr=whiskers, height=0.85, ecolor="#444444")
    end = float(row["p80_ms"]) if whiskers else value
    axis.text(end, position, f" {value:,.0f}" if value >= 100 else f" {value:.3g}", va="center", fontsize=8)


def color(variant: str, variants: list[str]) -> str:
    others = ["#2f7fb5", "#4c956c", "#7d5ba6", "#d9a441"]
    return COLORS.get(variant) or others[variants.index(variant) % len(others)]


if __name__ == "__main__":
    main()
