"""Pictures of a miniature run: loss curves, similarity by layer, and where the models look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from llava_compodistill.analysis.similarity import all_maps
from llava_compodistill.eval.scoring import batches
from llava_compodistill.pair.layers import visual_understanding_layers

from .evaluate import load_for_evaluation, read_captions
from .settings import METHODS, VERSION, Settings, label
from .world import COLORS as WORLD_COLORS

OVERLAY_EXAMPLES = 4


def draw_all(results: Sequence[dict[str, Any]], settings: Settings, root: Path) -> list[Path]:
    """Draw what the run's results allow and return the files."""
    import matplotlib

    matplotlib.use("Agg")
    students = [result for result in results if result["method"] != "teacher"]
    drawn = [draw_losses(students, root / "loss_curves.png")]
    drawn.append(draw_similarity(students, settings.band, root / "similarity.png"))
    drawn.append(draw_overlays(results, settings.band, root, root / "attention_overlays.png"))
    return drawn


def draw_losses(students: Sequence[dict[str, Any]], path: Path) -> Path:
    """L_LM, L_KL, L_ADL of the main stage and the attention similarity, over steps."""
    import matplotlib.pyplot as plt

    terms = {
        "lm": "$L_{LM}$",
        "kl": "$L_{KL}$",
        "attention": "$L_{ADL}$",
        "attention_similarity": "attention similarity",
    }
    figure, axes = plt.subplots(1, len(terms), figsize=(16, 3.6))
    for axis, (term, title) in zip(axes, terms.items(), strict=True):
        for method in dict.fromkeys(result["method"] for result in students):
            history = next(result for result in students if result["method"] == method)["history"]
            stage = "dft" if "dft" in history else "sft"
            points = [(entry["step"], entry[term]) for entry in history[stage] if term in entry]
            if points:
                steps, values = zip(*points, strict=True)
                axis.plot(steps, values, color=METHODS[method].color, label=METHODS[method].label, linewidth=1.4)
        axis.set_title(title)
        axis.set_xlabel("step of the main stage")
        axis.spines[["top", "right"]].set_visible(False)
        if term in ("lm", "kl"):
            axis.set_yscale("log")
    axes[0].legend(frameon=False, fontsize=9)
    return _save(figure, path)


def draw_similarity(students: Sequence[dict[str, Any]], band: str, path: Path) -> Path:
    """Similarity to the teacher's attention by layer, answer tokens as queries (the paper's Figure 2)."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4))
    depth = len(students[0]["scores"]["similarity_by_layer"])
    layers = visual_understanding_layers(depth, band)
    axis.axvspan(layers[0] - 0.5, layers[-1] + 0.5, color="#f0f0f0", label="layers that VAT aligns")
    for method in dict.fromkeys(result["method"] for result in students):
        curves = [r["scores"]["similarity_by_layer"] for r in students if r["method"] == method]
        curve = [mean(values) for values in zip(*curves, strict=True)]
        axis.plot(range(depth), curve, "o-", color=METHODS[method].color, label=METHODS[method].label)
    axis.set_xticks(range(depth))
    axis.set_xlabel("student layer (against the teacher layer that VAT matches, or at equal relative depth)")
    axis.set_ylabel("cosine similarity to the teacher")
    axis.set_title("Attention of the caption's tokens over the image")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    return _save(figure, path)


def draw_overlays(results: Sequence[dict[str, Any]], band: str, root: Path, path: Path) -> Path:
    """Attention over the image of the word that names a caption's second object by its colour, averaged over the
    layers that VAT aligns: teacher | KD | CompoDistill. To go on, a model has to find that object."""
    import matplotlib.pyplot as plt
    from PIL import Image

    seen: dict[str, dict[str, Any]] = {}
    for result in results:
        seen.setdefault(result["method"], result)
    columns = [m for m in ("teacher", "sft", "kd", "compodistill", "control") if m in seen]
    questions = _overlay_captions(root)
    looks: dict[str, list[np.ndarray]] = {}
    for method in columns:
        model, tokenizer = load_for_evaluation(Path(seen[method]["checkpoint"]))
        layers = visual_understanding_layers(model.config.num_hidden_layers, band)
        side = model.get_vision_tower().num_patches_per_side
        looks[method] = []
        for question, inputs in zip(
            questions, batches(questions, model, tokenizer, version=VERSION, batch_size=1), strict=True
        ):
            maps, batch = all_maps(model, inputs, layers)
            rows = batch.attention_rows("answer")[0].nonzero()[:, 0]  # the queries that say the caption's tokens
            # A row predicts a token; the next one is the row that has this token as its own.
            query = rows[_second_color(tokenizer, question.answer) + 1]
            look = sum(maps[layer][0, query] for layer in layers) / len(layers)
            looks[method].append((look / look.sum()).reshape(side, side).float().cpu().numpy())
    figure, axes = plt.subplots(
        len(questions), len(columns) + 1, figsize=(2.3 * (len(columns) + 1), 2.6 * len(questions)), squeeze=False
    )
    for row, question in enumerate(questions):
        with Image.open(question.image) as image:
            picture = np.asarray(image.convert("RGB").resize((224, 224), Image.NEAREST))
        axes[row][0].imshow(picture)
        axes[row][0].set_title(_caption_title(question.answer), fontsize=8)
        top = max(looks[method][row].max() for method in columns)
        for column, method in enumerate(columns, start=1):
            axis = axes[row][column]
            axis.imshow(picture.mean(axis=2), cmap="gray", alpha=0.55)
            shown = axis.imshow(
                looks[method][row], cmap="magma", alpha=0.65, vmin=0, vmax=top, extent=(0, 224, 224, 0),
                interpolation="nearest",
            )  # fmt: skip
            alike = _cosine(looks[method][row], looks["teacher"][row])
            axis.set_title(label(method) if method == "teacher" else f"{label(method)}\ncos {alike:.2f}", fontsize=8.5)
        figure.colorbar(shown, ax=axes[row].tolist(), fraction=0.012, pad=0.01)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle("Where the [word] looks in the image, mean of the layers that VAT aligns", y=0.94)
    return _save(figure, path, tight=False)


def _overlay_captions(root: Path) -> list[Any]:
    """A few true captions of two objects in a relation."""
    captions = read_captions(root / "data", "test", ["swap_obj"])
    return captions[:: max(1, len(captions) // OVERLAY_EXAMPLES)][:OVERLAY_EXAMPLES]


def _second_color(tokenizer: Any, caption: str) -> int:
    """Which of the caption's tokens names the second object's colour (every word of the world is one token)."""
    words = [tokenizer.decode([token]).strip() for token in tokenizer(caption).input_ids]
    return [index for index, word in enumerate(words) if word in WORLD_COLORS][1]


def _caption_title(caption: str) -> str:
    """The caption on two lines, the second object's colour in brackets."""
    words = caption.split()
    second = [index for index, word in enumerate(words) if word in WORLD_COLORS][1]
    words[second] = f"[{words[second]}]"
    start = words.index("a", 1)
    return f"{' '.join(words[:start])}\n{' '.join(words[start:])}"


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def _save(figure: Any, path: Path, tight: bool = True) -> Path:
    import matplotlib.pyplot as plt

    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
