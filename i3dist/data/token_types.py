"""How shards store tokens: the `dtype` of a manifest.

A stored token is an unsigned integer: the token's id, and with a mask a bit that tells whether the
token is learned, which means that training predicts it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Stored = NDArray[np.unsignedinteger]
"""Tokens as they are stored, in the type of their `TokenType`."""

LARGEST_VOCABULARY = 1 << 24
LEARNED = np.uint32(1 << 31)
"""The bit of a learned token."""


@dataclass(frozen=True)
class TokenType:
    """A `dtype`, and the lowest version of the format that has it."""

    name: str
    version: Literal[1, 2]
    dtype: np.dtype[np.unsignedinteger]
    vocabulary: int
    """Most entries of a vocabulary."""
    has_mask: bool = False

    def ids(self, stored: Stored) -> Stored:
        """The ids of stored tokens."""
        return stored & ~LEARNED if self.has_mask else stored

    def learned(self, stored: Stored) -> NDArray[np.bool_] | None:
        """Which of them are learned; None without a mask: then all are."""
        return stored >= LEARNED if self.has_mask else None


UINT16 = TokenType("uint16-le", 1, np.dtype("<u2"), 1 << 16)
UINT32 = TokenType("uint32-le", 2, np.dtype("<u4"), LARGEST_VOCABULARY)
MASKED = TokenType("uint32-le-masked", 2, np.dtype("<u4"), LARGEST_VOCABULARY, has_mask=True)

TOKEN_TYPES = {kind.name: kind for kind in (UINT16, UINT32, MASKED)}


def token_type(vocab_size: int, *, has_mask: bool = False) -> TokenType:
    """The type for a vocabulary: the smallest one."""
    if has_mask:
        return MASKED
    return UINT16 if vocab_size <= UINT16.vocabulary else UINT32


def with_mask(ids: Stored, learned: NDArray[np.bool_], *, copy: bool = True) -> NDArray[np.uint32]:
    """Tokens as `MASKED` stores them, [T]. Without `copy`, uint32 `ids` become these tokens."""
    stored = ids.astype(np.uint32, copy=copy)
    return np.bitwise_or(stored, LEARNED, out=stored, where=learned)
