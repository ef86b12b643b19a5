"""Log-probabilities and attention maps in fewer bits, and zeros of maps in one.

* Log-probabilities of a row: even steps from its smallest to its largest, both of which stay as they are. An error is
  at most half a step, (largest - smallest) / (2 (2^bits - 1)) nats; the row is renormalised when it is read.
* Attention of a row over visual tokens: even steps of the square root of x / peak, so that small values keep more of
  their size than even steps of x would leave them. An error is at most sqrt(x peak) / L + peak / (4 L^2) with
  L = 2^bits - 1, and 0 and the peak stay as they are.

32 bits are the float32 values themselves. Codes of a map are stored as they are, or, where that is smaller, as one bit
for each entry and the codes that are not 0: a causal map is 0 in half of the square of an image's own rows.
"""

from __future__ import annotations

import numpy as np
import torch

LOGIT_BITS = (8, 16, 32)
MAP_BITS = (4, 8, 16, 32)
_CODES = {8: torch.uint8, 16: torch.int32}


def levels(bits: int) -> int:
    """L, the largest code."""
    return 2**bits - 1


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities
# ---------------------------------------------------------------------------------------------------------------------
def quantise_log_probs(log_probs: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, k] -> codes [R, k] and (smallest, largest) [R, 2]; of 32 bits the values, and [R, 0]."""
    values = log_probs.float()
    if bits == 32 or not values.numel():
        return values, values.new_zeros(len(values), 0 if bits == 32 else 2)
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    share = (values - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return (share * levels(bits)).round().to(_CODES[bits]), torch.cat([low, high], dim=1)


def restore_log_probs(codes: torch.Tensor, ends: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, k] float32 of what `quantise_log_probs` gave."""
    if bits == 32:
        return codes
    low, high = ends[:, :1], ends[:, 1:]
    return low + codes.float() / levels(bits) * (high - low)


def renormalise(log_probs: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A distribution of k tokens [R, k] and the rest [R] in nats, with a sum of 1 again."""
    total = torch.logsumexp(torch.cat([log_probs, rest[:, None]], dim=1), dim=1, keepdim=True)
    return log_probs - total, rest - total[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Maps
# ---------------------------------------------------------------------------------------------------------------------
def quantise_map(attention: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, N_v], at least 0 -> codes [M, N_v] and peaks [M]; of 32 bits the values, and [0]."""
    values = attention.float()
    if bits == 32:
        return values, values.new_zeros(0)
    if not values.numel():
        return values.to(_CODES[max(8, bits)]), values.new_zeros(len(values))
    peaks = values.amax(dim=1)
    share = values / peaks.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return (share.sqrt() * levels(bits)).round().to(_CODES[max(8, bits)]), peaks


def restore_map(codes: torch.Tensor, peaks: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., N_v] float32 of codes [..., N_v] and peaks [...]."""
    if bits == 32:
        return codes
    return (codes.float() / levels(bits)).square_().mul_(peaks[..., None])


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------
def packed(codes: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [n] -> (mask, codes) as they are stored; the mask is empty where all of them are."""
    codes = codes.ravel()
    occupied = codes != 0
    count = int(occupied.sum())
    if sparse_bytes(codes.size, count, bits) < _bytes(codes.size, bits):
        return np.packbits(occupied), _narrow(codes[occupied], bits)
    return np.zeros(0, np.uint8), _narrow(codes, bits)


def unpacked(mask: np.ndarray, stored: np.ndarray, bits: int, size: int) -> np.ndarray:
    """The codes [size] that `packed` was given."""
    if not mask.size:
        return _wide(stored, bits, size)
    occupied = np.unpackbits(mask, count=size).view(bool)
    codes = np.zeros(size, np.float32 if bits == 32 else stored.dtype)
    codes[occupied] = _wide(stored, bits, int(occupied.sum()))
    return codes


def dense_or_sparse_bytes(size: int, occupied: int, bits: int) -> int:
    """Bytes that `packed` makes of codes of which so many are not 0."""
    return min(_bytes(size, bits), sparse_bytes(size, occupied, bits))


def sparse_bytes(size: int, occupied: int, bits: int) -> int:
    """Bytes with one bit for each entry."""
    return -(-size // 8) + _bytes(occupied, bits)


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _narrow(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits != 4:
        return codes.astype({8: np.uint8, 16: np.uint16, 32: np.float32}[bits])
    pairs = np.zeros(-(-codes.size // 2) * 2, np.uint8)
    pairs[: codes.size] = codes
    return pairs[0::2] | pairs[1::2] << 4


def _wide(stored: np.ndarray, bits: int, size: int) -> np.ndarray:
    if bits != 4:
        return stored
    codes = np.empty(2 * stored.size, np.uint8)
    codes[0::2], codes[1::2] = stored & 15, stored >> 4
    return codes[:size]
