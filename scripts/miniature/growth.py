"""A teacher that reads the image in its middle layers, as large language models do.

A model as small as these, trained from scratch on nine visual tokens, reads the image in its first layer. So a shallow
teacher is trained first, and then grown: new layers are put under its own, which begin as identities, so that what
read in the first layer now reads further up. In the training that follows text sees the image in the middle band
alone (`--image_layers intermediate`), and the new layers learn to work on the text; a last stage trains with the
image in sight of all layers. Where the grown teacher reads is measured afterwards (`miniature layers`).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from .weights import OF_A_RUN

_LAYER = re.compile(r"(?<=model\.layers\.)\d+")


def grow(checkpoint: Path, out: Path, below: int, kept: int, seed: int = 0) -> Path:
    """Write a checkpoint with `below` new layers under the first `kept` of another's; the layers above are left out.

    The new layers have random weights but for the two that write into the residual stream, which are 0: with all
    layers kept the grown model computes what the other does.

    Args:
        checkpoint: folder of a LLaVA model whose weights are in one safetensors file.
        out: folder to write.

    Raises:
        ValueError: when the checkpoint has fewer layers than are to be kept.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if not 0 < kept <= config["num_hidden_layers"]:
        raise ValueError(f"{checkpoint} has {config['num_hidden_layers']} layers; {kept} cannot be kept.")
    weights, grown = load_file(checkpoint / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(seed)
    for name, value in weights.items():
        layer = _LAYER.search(name)
        if layer is None:
            grown[name] = value
        elif int(layer.group()) < kept:
            grown[_LAYER.sub(str(int(layer.group()) + below), name)] = value
    for number in range(below):
        for name, value in weights.items():
            if "model.layers.0." in name:
                new = _initial(name, value, config["initializer_range"], generator)
                grown[_LAYER.sub(str(number), name)] = new
    config["num_hidden_layers"] = below + kept
    if "layer_types" in config:
        config["layer_types"] = [config["layer_types"][0]] * (below + kept)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.suffix in (".json", ".txt") and not path.name.startswith((*OF_A_RUN, "model.safetensors")):
            shutil.copy(path, out / path.name)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(grown, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _initial(name: str, like, scale: float, generator):
    """Weights of a new layer: norms 1, biases 0, and nothing written into the residual stream."""
    import torch

    if name.endswith("norm.weight"):
        return torch.ones_like(like)
    if name.endswith("bias") or ".o_proj." in name or ".down_proj." in name:
        return torch.zeros_like(like)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype) * scale
