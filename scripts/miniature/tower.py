"""A small real SigLIP vision tower that sees the miniature world, trained with per-cell labels.

LLaVA feeds its adapter with the tower's ``hidden_states[-2]``. The supervision sits on exactly that layer: linear
heads read the colour, shape and size (or emptiness) of a cell, and its row and column, from the cell's patch feature.
The heads are thrown away. The tower's last layer comes after the supervised one; it stays at its initial values, and
exists because LLaVA's convention skips it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .world import (
    BACKGROUND,
    CELL,
    COLORS,
    EXTRA_SHAPES,
    GRID,
    HELD_OUT,
    IMAGE_SIZE,
    SEEN,
    SHAPES,
    SIZES,
    Pair,
    Scene,
    cell_labels,
    pick,
    pick_distinct,
    place,
    render_array,
    sample_scene,
)

if TYPE_CHECKING:
    import torch
    from transformers import SiglipVisionModel

FEATURE_LAYER = -2
HEADS = {"color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "size": len(SIZES) + 1, "row": GRID, "column": GRID}


@dataclass(frozen=True)
class TowerSettings:
    """Size and training of the tower; the defaults take about half a minute on one CPU core."""

    hidden_size: int = 64
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup: int = 30
    weight_decay: float = 0.01
    scale_penalty: float = 0.02
    seed: int = 0


def _unnamed_color(rng: np.random.Generator) -> str:
    """A colour that is none of the world's, so that no held-out combination is shown by accident."""
    named = np.asarray(list(COLORS.values()))
    while True:
        rgb = rng.integers(0, 256, size=3)
        if np.abs(named - rgb).max(axis=1).min() > 45 and np.abs(rgb - BACKGROUND).max() > 70:
            return "#{:02x}{:02x}{:02x}".format(*(int(v) for v in rgb))


def training_scene(rng: np.random.Generator) -> Scene:
    """A third ordinary scenes; a third crowded ones, for more labelled cells per image; a third with unnamed things.

    The last have unnamed shapes in the world's colours and the world's shapes in unnamed colours. They teach colour
    apart from shape as a web-trained encoder would have learned it, without ever showing a held-out combination.
    """
    which = int(rng.integers(3))
    if which == 0:
        return sample_scene(rng)
    count = int(rng.integers(5, 9))
    if which == 1:
        return place(rng, pick_distinct(rng, SEEN, count))
    shapes = pick_distinct(rng, [(c, s) for c in COLORS for s in EXTRA_SHAPES], count // 2)
    return place(rng, shapes + [(_unnamed_color(rng), pick(rng, SHAPES)) for _ in range(count - len(shapes))])


def render_batch(scenes: list[Scene], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, float32 ``[B, 3, 42, 42]`` in -1…1 as from the image processor, and labels, int64 ``[B, 9, 5]``."""
    pixels = np.stack([render_array(s, rng) for s in scenes]).astype(np.float32) / 127.5 - 1.0
    content = np.stack([cell_labels(s) for s in scenes])
    cells = np.arange(GRID * GRID)
    position = np.broadcast_to(np.stack([cells // GRID, cells % GRID], axis=-1), (len(scenes), GRID * GRID, 2))
    return pixels.transpose(0, 3, 1, 2), np.concatenate([content, position], axis=-1)


def build_tower(settings: TowerSettings) -> SiglipVisionModel:
    """An untrained tower, whose position table starts as row + column vectors, so that the grid is easy to read."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(settings.seed)
    config = SiglipVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=CELL,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
    )
    model = SiglipVisionModel(config)
    rows = torch.randn(GRID, 1, settings.hidden_size)
    columns = torch.randn(1, GRID, settings.hidden_size)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == GRID * GRID:
            module.weight.data.copy_(0.5 * (rows + columns).reshape(GRID * GRID, -1))
    return model


def features(model: SiglipVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """What LLaVA hands to its adapter: ``hidden_states[-2]``, ``[B, 9, hidden_size]``."""
    return model(pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER]


def train_tower(
    out: str | Path, settings: TowerSettings | None = None, evaluate_on: int = 500, progress: bool = True
) -> dict[str, float]:
    """Train, save the folder ``out`` and return :func:`cell_accuracy` on fresh scenes (also in ``out/world.json``)."""
    import torch
    from tqdm import trange

    settings = settings or TowerSettings()
    model = build_tower(settings).train()
    rng = np.random.default_rng([settings.seed, 11])
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(settings.hidden_size, n) for name, n in HEADS.items()})
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    def rate(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        return 0.5 * (1 + np.cos(np.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    bar = trange(settings.steps, desc="vision tower", disable=not progress)
    for step in bar:
        pixels, labels = render_batch([training_scene(rng) for _ in range(settings.batch_size)], rng)
        states, targets = features(model, torch.from_numpy(pixels)), torch.from_numpy(labels)
        # A light pull on the scale: features of unit size suit the adapter that is trained on them.
        loss = settings.scale_penalty * states.pow(2).mean()
        for i, name in enumerate(HEADS):
            loss = loss + torch.nn.functional.cross_entropy(
                heads[name](states).flatten(0, 1), targets[..., i].flatten()
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    report = cell_accuracy(model, heads, SEEN, evaluate_on, settings.seed)
    report |= {f"unseen_{k}": v for k, v in cell_accuracy(model, heads, HELD_OUT, evaluate_on, settings.seed).items()}
    save_tower(model, out)
    (Path(out) / "world.json").write_text(json.dumps({"settings": vars(settings), "accuracy": report}, indent=1))
    return report


def cell_accuracy(
    model: SiglipVisionModel, heads: torch.nn.ModuleDict, pairs: tuple[Pair, ...], images: int, seed: int
) -> dict[str, float]:
    """Accuracy of each linear head on fresh scenes over ``pairs``.

    ``color``, ``shape`` and ``size`` count occupied cells only; ``empty`` is the empty/occupied decision, all cells.
    """
    import torch

    rng = np.random.default_rng([seed, 12, len(pairs)])
    pixels, labels = render_batch([sample_scene(rng, pairs) for _ in range(images)], rng)
    targets = torch.from_numpy(labels)
    with torch.no_grad():
        states = features(model, torch.from_numpy(pixels))
        guesses = {name: heads[name](states).argmax(-1) for name in HEADS}
    occupied = targets[..., 0] > 0
    report = {"empty": ((guesses["color"] > 0) == occupied).float().mean().item()}
    for i, name in enumerate(HEADS):
        hits = guesses[name] == targets[..., i]
        report[name] = (hits[occupied] if i < 3 else hits).float().mean().item()
    return report


def save_tower(model: SiglipVisionModel, out: str | Path) -> Path:
    """Save weights, config and the image processor's settings in the form that transformers 4.37 and 5 both read."""
    from safetensors.torch import save_file

    out = Path(out)
    # transformers 5 drops this prefix when it saves, while 4.x cannot load without it; both read the prefixed form,
    # which is how SigLIP's public checkpoints are stored.
    prefix = "vision_model."
    state = {k if k.startswith(prefix) else prefix + k: v.contiguous() for k, v in model.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(out)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["SiglipVisionModel"]
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    processor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
    return out
