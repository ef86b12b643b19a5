"""Pictures of the analyses. Every one names its axes, their units, the number of samples and what the bands are."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .experiments import Bins, Intervention, Mean

#: Okabe and Ito's colours, told apart by the colour-blind.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999")


def _new(columns: int = 1, rows: int = 1, width: float = 4.8, height: float = 3.6) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Any, axis: Any) -> None:
    """Below the figure, where long names cover nothing."""
    handles, labels = axis.get_legend_handles_labels()
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 11 // max(map(len, labels)))))
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": columns}
    figure.legend(handles, labels, frameon=False, fontsize=8, **place)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)
    return path


def draw_similarity(
    found: Mapping[tuple[str, str], Mapping[str, Sequence[Mean]]],
    reference: str,
    band: tuple[float, float],
    path: Path,
    unit: str = "samples",
    bands: str = "95 % over samples",
) -> Path:
    """Figures 2 and 9: a panel for each (data, keys), a curve for each model over relative depth.

    Args:
        found: by (data, keys), then by model, the mean of each of its layers.
        band: relative depths between which the visual understanding layers lie.
        unit: of what the means are over; `bands`: what their half-widths are.
    """
    names = list(dict.fromkeys(name for name, _ in found))
    kinds = list(dict.fromkeys(kind for _, kind in found))
    figure, axes = _new(len(names), len(kinds))
    means = [layer for curves in found.values() for layers in curves.values() for layer in layers]
    lowest, highest = (
        fold(layer.value + sign * layer.half for layer in means) for fold, sign in ((min, -1), (max, 1))
    )
    shown = band[1] - band[0] < 1
    for (name, kind), curves in found.items():
        axis = axes[kinds.index(kind)][names.index(name)]
        axis.set_ylim(lowest - 0.02, highest + 0.02)
        if shown:
            axis.axvspan(*band, color="0.93", zorder=0)
        for color, (model, layers) in zip(COLORS, curves.items(), strict=False):
            depth = (np.arange(len(layers)) + 0.5) / len(layers)
            values, half = (np.array([getattr(layer, what) for layer in layers]) for what in ("value", "half"))
            axis.plot(depth, values, "o-", color=color, label=model, markersize=3.5)
            axis.fill_between(depth, values - half, values + half, color=color, alpha=0.2, linewidth=0)
        count = next(iter(curves.values()))[0].n
        counted = f"{count} {unit.removesuffix('s') if count == 1 else unit}"
        axis.set_title(f"{name}, {counted}: {kind} tokens", fontsize=10)
        axis.set_xlim(0, 1)
        axis.set_xlabel("relative depth of the layer")
        axis.set_ylabel(f"cosine similarity to {reference}")
    grey = "; grey: the layers that VAT aligns" if shown else ""
    figure.suptitle(f"Attention of the answer's tokens (bands: {bands}{grey})", fontsize=11)
    figure.tight_layout()
    _legend(figure, axes[0][0])
    return _save(figure, path)


def draw_probability(
    found: Mapping[str, Bins], reference: str, path: Path, count: int | None = None, bars: str = "95 % over samples"
) -> Path:
    """Figure 3: a curve for each model.

    Args:
        count: samples, where the points are not made of them.
    """
    figure, axes = _new()
    axis = axes[0][0]
    for color, (model, bins) in zip(COLORS, found.items(), strict=False):
        axis.errorbar(
            [point.value for point in bins.similarity],
            [point.value for point in bins.probability],
            yerr=np.array([(min(p.half, p.value), min(p.half, 1 - p.value)) for p in bins.probability]).T,
            fmt="o-",
            color=color,
            capsize=2,
            markersize=4,
            label=f"{model}: Spearman {bins.correlation:+.2f}, "
            f"n = {count or sum(point.n for point in bins.probability)}",
        )
    axis.set_xlabel(f"similarity of the attention to that of {reference} (mean of the bin)")
    axis.set_ylabel("probability of the right answer, a token")
    axis.set_title(f"Samples in bins of equal size (bars: {bars})", fontsize=10)
    figure.tight_layout()
    _legend(figure, axis)
    return _save(figure, path)


def draw_intervention(found: Mapping[str, Intervention], path: Path, bars: str = "95 % of paired differences") -> Path:
    """Figure 4: for each model and subset, the change of its accuracy."""
    names = list(next(iter(found.values())).difference)
    figure, axes = _new(width=max(6.4, 0.95 * len(names)))
    axis = axes[0][0]
    width = min(0.8 / len(found), 0.25)
    for place, (color, (model, result)) in enumerate(zip(COLORS, found.items(), strict=False)):
        at = np.arange(len(names)) + (place - (len(found) - 1) / 2) * width
        values = [result.difference[name] for name in names]
        axis.bar(at, [value.value for value in values], width, color=color, label=model)
        axis.errorbar(
            at, [value.value for value in values], [value.half for value in values], fmt="none", color="0.2", capsize=2
        )
    axis.axhline(0, color="0.2", linewidth=0.8)
    counts = next(iter(found.values())).difference
    axis.set_xticks(range(len(names)), [f"{name or 'all'}\nn = {counts[name].n}" for name in names], fontsize=8)
    axis.set_ylabel("change of accuracy, percentage points")
    axis.set_title(
        f"With the mean of the teacher's and its own attention over the image\n(bars: {bars})",
        fontsize=10,
    )
    axis.set_xlim(-0.6, len(names) - 0.4)
    figure.tight_layout()
    _legend(figure, axis)
    return _save(figure, path)


def draw_knockout(found: Mapping[str, tuple[tuple[Mean, Mean], Sequence[tuple[Mean, Mean]]]], path: Path) -> Path:
    """Accuracy and cost of the answer where text loses sight of the image in one layer at a time."""
    figure, axes = _new(2)
    labels = ("accuracy, %", "cost of the right answer, nats a token")
    for which, (axis, label) in enumerate(zip(axes[0], labels, strict=True)):
        for color, (model, (whole, layers)) in zip(COLORS, found.items(), strict=False):
            values = [layer[which] for layer in layers]
            axis.errorbar(
                range(len(values)), [value.value for value in values], [value.half for value in values], fmt="o-",
                color=color, capsize=2, markersize=4, label=f"{model}, n = {whole[which].n}",
            )  # fmt: skip
            axis.axhline(whole[which].value, color=color, linestyle=":", linewidth=1)
        axis.set_xlabel("layer in which text does not see the image")
        axis.set_ylabel(label)
    figure.suptitle(
        "One layer without sight at a time (dotted: the whole model; bars: 95 % over samples)", fontsize=11
    )
    figure.tight_layout()
    _legend(figure, axes[0][0])
    return _save(figure, path)


def draw_overlays(rows: Sequence[tuple[str, Any, Mapping[str, np.ndarray]]], reference: str, path: Path) -> Path:
    """Figures 1b, 6 and 7: a row for each image: the image, then each model's attention over it.

    Args:
        rows: (title, PIL image, by model the attention over the grid of visual tokens).
    """
    models = list(rows[0][2])
    figure, axes = _new(len(models) + 1, len(rows), 2.5, 2.8)
    for line, (title, image, looks) in zip(axes, rows, strict=True):
        line[0].imshow(image)
        line[0].set_title("\n".join(textwrap.fill(part, 34) for part in title.split("\n")), fontsize=8)
        gray = np.asarray(image.convert("L"))
        extent = (0, image.width, image.height, 0)
        top = max(float((look / look.sum()).max()) for look in looks.values())
        for axis, model in zip(line[1:], models, strict=True):
            look = looks[model] / looks[model].sum()
            axis.imshow(gray, cmap="gray", alpha=0.55, extent=extent)
            shown = axis.imshow(
                look, cmap="magma", alpha=0.65, vmin=0, vmax=top, extent=extent, interpolation="nearest"
            )
            other = looks[reference] / looks[reference].sum()
            cosine = float((look * other).sum() / np.sqrt((look**2).sum() * (other**2).sum()))
            title = textwrap.fill(model, 24)
            axis.set_title(title if model == reference else f"{title}\ncosine {cosine:.2f}", fontsize=8)
        figure.colorbar(shown, ax=list(line), fraction=0.012, pad=0.01, label="share of the attention")
    for axis in axes.flat:
        axis.set_axis_off()
    what = f"Attention over the visual tokens (cosine: with that of {reference})"
    figure.text(0.5, 0.09, what, ha="center", va="top", fontsize=9)
    return _save(figure, path)


def draw_curves(
    found: Mapping[str, Sequence[Sequence[Sequence[float]]]],
    axis_label: str,
    levels: Mapping[str, float],
    path: Path,
) -> Path:
    """Accuracy over training steps: a curve for each model, its mean over seeds, and each seed as a thin line.

    Args:
        found: by model, for each seed its [steps, accuracy in %] in order.
        axis_label: what the accuracy is of.
        levels: {name: accuracy}, drawn as dotted lines: chance, the teacher.
    """
    figure, axes = _new(width=6.4, height=4.0)
    axis = axes[0][0]
    for color, (model, curves) in zip(COLORS, found.items(), strict=False):
        for curve in curves:
            axis.plot(*zip(*curve, strict=True), color=color, alpha=0.25, linewidth=0.8)
        shared = [steps for steps, _ in curves[0] if all(any(s == steps for s, _ in curve) for curve in curves)]
        means = [np.mean([dict(map(tuple, curve))[steps] for curve in curves]) for steps in shared]
        axis.plot(shared, means, "o-", color=color, linewidth=2, markersize=4, label=f"{model} (n = {len(curves)})")
    axis.set_xlabel("optimizer steps, all stages")
    axis.set_ylabel(axis_label)
    axis.set_ylim(min(min(levels.values()) - 10, axis.get_ylim()[0]), 102)
    for name, level in levels.items():
        axis.axhline(level, color="0.5", linestyle=":", linewidth=1)
        # Outside, at the right, where no curve is.
        axis.annotate(
            name, (1, level), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8, color="0.4",
        )  # fmt: skip
    _legend(figure, axis)
    return _save(figure, path)
