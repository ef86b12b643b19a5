"""Sizes of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from head import Shape as HeadShape
from op import Shape as OpShape
from pair import PairSpec, decoder, siglip


@dataclass(frozen=True)
class Preset:
    name: str
    ops: list[OpShape]
    heads: list[HeadShape]
    pair: PairSpec
    batches: tuple[int, ...]
    limits: tuple[float, ...]
    global_batch: int = 128  # samples of an optimizer step: the paper's in DFT and SFT

    def change(
        self, batches: tuple[int, ...] | None, lengths: tuple[int, ...] | None, limits: tuple[float, ...] | None
    ) -> Preset:
        preset = replace(self, batches=batches or self.batches, limits=limits or self.limits)
        if lengths:
            ops = {replace(op, length=length) for op in self.ops for length in lengths if op.visual <= length}
            preset = replace(
                preset,
                ops=sorted(ops, key=lambda op: (op.length, op.head_size)),
                pair=replace(self.pair, lengths=lengths),
            )
        return preset


QWEN15_4B = decoder(hidden=2560, layers=40, heads=20, kv_heads=20, intermediate=6912, vocab=151_936)
QWEN15_18B = decoder(hidden=2048, layers=24, heads=16, kv_heads=16, intermediate=5504, vocab=151_936)
SO400M = siglip(hidden=1152, layers=27, heads=16, intermediate=4304, pixels=384, patch=14)
BF16, FP32 = torch.bfloat16, torch.float32

PAPER = Preset(
    name="paper",
    ops=[
        OpShape(8, 16, 16, 1024, 128, 729, BF16),
        OpShape(8, 16, 16, 2048, 128, 729, BF16),
        OpShape(8, 20, 20, 2048, 128, 729, BF16),
        OpShape(8, 28, 4, 2048, 128, 729, BF16),  # Qwen2.5-7B: grouped queries
        OpShape(8, 16, 16, 2048, 64, 576, BF16),
    ],
    heads=[
        HeadShape(8192, 1600, 2048, 2560, 151_936, BF16),
        HeadShape(8192, 1600, 2048, 2560, 151_936, BF16, train_head=False),
    ],
    pair=PairSpec(QWEN15_4B, QWEN15_18B, SO400M, answers=200, dtype=BF16),
    batches=(1, 8),
    limits=(48, 139),
)
#: The ratios of a GPU at sizes for which two cores need seconds.
CPU = Preset(
    name="cpu",
    ops=[
        OpShape(1, 16, 16, 512, 64, 256, FP32),
        OpShape(1, 16, 16, 1024, 64, 576, FP32),
        OpShape(1, 16, 4, 1024, 64, 576, FP32),
        OpShape(4, 16, 16, 1024, 64, 576, FP32),
    ],
    heads=[
        HeadShape(1024, 128, 256, 320, 32_000, FP32),
        HeadShape(1024, 128, 256, 320, 32_000, FP32, train_head=False),
    ],
    pair=PairSpec(
        decoder(hidden=320, layers=10, heads=5, kv_heads=5, intermediate=864, vocab=32_000),
        decoder(hidden=256, layers=6, heads=4, kv_heads=4, intermediate=688, vocab=32_000),
        siglip(hidden=144, layers=4, heads=4, intermediate=538, pixels=224, patch=14),
        answers=64,
        dtype=FP32,
        lengths=(512,),
    ),
    batches=(1, 2),
    limits=(1, 2),
)
#: A student of 134M parameters from a teacher of 368M, for what is a matter of proportions.
MEDIUM = Preset(
    name="medium",
    ops=CPU.ops,
    heads=CPU.heads,
    pair=PairSpec(
        decoder(hidden=1024, layers=24, heads=16, kv_heads=16, intermediate=2816, vocab=32_000),
        decoder(hidden=768, layers=12, heads=12, kv_heads=12, intermediate=2048, vocab=32_000),
        siglip(hidden=768, layers=12, heads=12, intermediate=3072, pixels=224, patch=14),
        answers=64,
        dtype=FP32,
        lengths=(512,),
    ),
    batches=(4,),
    limits=(8,),
)
#: Its models on short samples: nearly all memory is weights, gradients and optimizer states (`plan`).
SHORT = replace(
    MEDIUM,
    name="short",
    pair=replace(MEDIUM.pair, tower=replace(MEDIUM.pair.tower, pixels=112), answers=32, lengths=(128,)),
)
#: scripts/miniature/settings.py: nine visual tokens, about 60 positions.
MINIATURE = Preset(
    name="miniature",
    ops=[OpShape(32, 2, 2, 64, 32, 9, FP32)],
    heads=[HeadShape(32 * 64, 32 * 8, 64, 96, 192, FP32)],
    pair=PairSpec(
        decoder(hidden=96, layers=6, heads=2, kv_heads=2, intermediate=256, vocab=192),
        decoder(hidden=64, layers=6, heads=2, kv_heads=2, intermediate=192, vocab=192),
        siglip(hidden=64, layers=4, heads=4, intermediate=128, pixels=42, patch=14),
        answers=12,
        dtype=FP32,
        lengths=(64,),
    ),
    batches=(32,),
    limits=(0.05,),
    global_batch=32,
)
PRESETS = {preset.name: preset for preset in (PAPER, CPU, MEDIUM, SHORT, MINIATURE)}
