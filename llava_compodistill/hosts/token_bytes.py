"""Which bytes of a text each token stands for, read from the vocabulary itself.

The two kinds that today's language models have write their tokens differently: byte-level BPE (GPT-2, Qwen, Llama 3)
gives every byte a printable character, SentencePiece (Llama 2, Vicuna, Mistral) writes a space as ▁ and bytes that
have no piece as <0xE6>. Decoding prefixes of a sequence instead would meet characters cut in two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


def _byte_characters() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself where it is printable, else one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


class TokenBytes:
    """Looks up the bytes of tokens.

    Args:
        tokenizer: of transformers, slow or fast.

    Raises:
        ValueError: for a tokenizer of neither kind, naming it.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        characters = _byte_characters()
        if all(character in vocabulary for character in characters):
            self._characters: dict[str, int] | None = characters
        elif any(token.startswith(_SPACE) for token in vocabulary):
            self._characters = None
        else:
            raise ValueError(
                f"{type(tokenizer).__name__} of {tokenizer.name_or_path} is neither byte-level BPE (GPT-2, Qwen) nor "
                "SentencePiece (Llama): its tokens cannot be traced to the bytes of a text."
            )
        self._added = dict(tokenizer.added_tokens_decoder)
        self._known: dict[int, bytes] = {}

    def __call__(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of each token; b"" for special tokens, which belong to no text, and for images' placeholders."""
        return [self._known[index] if index in self._known else self._look_up(index) for index in ids]

    def _look_up(self, index: int) -> bytes:
        added = self._added.get(index)
        if index < 0:
            found = b""
        elif added is not None:
            found = b"" if added.special else added.content.encode()
        else:
            found = self._read(self._tokenizer.convert_ids_to_tokens(index))
        self._known[index] = found
        return found

    def _read(self, token: str) -> bytes:
        if self._characters is not None:
            return bytes(self._characters[character] for character in token)
        piece = _BYTE_PIECE.fullmatch(token)
        return bytes([int(piece[1], 16)]) if piece else token.replace(_SPACE, " ").encode()
