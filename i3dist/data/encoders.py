"""Encoders: the libraries that turn text into the ids of a `tokenizer.json`.

`tokenizers` defines the ids. The encoders in `ENCODERS` are faster. One of them is used only if it
gives the same ids on `trial_texts`. Otherwise the next one is tried, and at last `tokenizers`.
"""

import functools
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import psutil
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.normalizers import NFC

from i3dist.data.long_texts import Encode, Ids, encodes_in_pieces
from i3dist.heap import give_back

_CACHE_BYTES = 1 << 26
_BYTES_BETWEEN_LOOKS = 1 << 22
_PIECE = re.compile(rb".{1,512}[\x80-\xe4\xe9-\xff]*", re.DOTALL)
"""Pieces of a text that end before ASCII, or Chinese characters (from U+5000 to U+8FFF), which NFC
composes with nothing before them."""


class UnsuitableError(Exception):
    """An encoder gives other ids than `tokenizers`; the message says for which text."""


@dataclass(frozen=True)
class Encoder:
    """The encoder that was chosen, by the name of its library."""

    name: str
    encode: Encode
    rejected: Mapping[str, str]
    """Why the encoders before it in `ENCODERS` were not taken, by name."""

    def __str__(self) -> str:
        reasons = "".join(f"; {name} is not used: {why}" for name, why in self.rejected.items())
        return f"encoding with {self.name} {metadata.version(self.name)}{reasons}"


class Gigatoken:
    """gigatoken, on the calling thread and in bounded memory.

    It keeps the ids of every word that it has seen, without a limit. When the process has grown by
    64 MiB, the encoder is built again. Long texts come in pieces, so this also happens within one.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        """Build from the content of a `tokenizer.json`."""
        # gigatoken makes special ids of special tokens in a text, unless it does not know them.
        self._json = json.dumps({**spec, "added_tokens": []})
        added = (token["id"] for token in spec["added_tokens"])
        self._dtype = _dtype_of(max(*spec["model"]["vocab"].values(), *added) + 1)
        self._process = psutil.Process()
        self._encode, self._limit = self._build()
        self._unseen = 0

    def __call__(self, text: bytes) -> Ids:
        """Ids of a text, [T]."""
        self._unseen += len(text)
        if self._unseen > _BYTES_BETWEEN_LOOKS:
            self._unseen = 0
            if self._process.memory_info().rss > self._limit:
                del self._encode  # before the next one is built
                self._encode, self._limit = self._build()
        ids: Ids = self._encode(text).astype(self._dtype, copy=False)
        return ids

    def _build(self) -> tuple[Any, int]:
        """A new encoder, and the memory of the process above which to build the next one."""
        from gigatoken import Tokenizer

        encode = Tokenizer.from_json(self._json).backend.encode
        return encode, self._process.memory_info().rss + _CACHE_BYTES


class Normalizing:
    """Gives an encoder the text that the tokenizer's own normalizer makes.

    Libraries know other versions of Unicode, so each of them composes other rare characters.
    """

    def __init__(self, backend: HFTokenizer, encode: Encode) -> None:
        self._normalize = backend.normalizer.normalize_str
        self._is_nfc = isinstance(backend.normalizer, NFC)
        self._encode = encode

    def __call__(self, text: bytes) -> Ids:
        """Ids of a text, [T]."""
        if self._is_nfc:
            return self._encode(text if text.isascii() else self._in_nfc(text))
        return self._encode(self._normalize(text.decode()).encode())

    def _in_nfc(self, text: bytes) -> bytes:
        """The text itself if it is in NFC already, as most texts are: a copy may be large."""
        changed: io.BytesIO | None = None
        for piece in _PIECE.finditer(text):
            normalized = piece[0] if piece[0].isascii() else self._nfc(piece[0])
            if changed is None and normalized != piece[0]:
                changed = io.BytesIO()
                changed.write(memoryview(text)[: piece.start()])
            if changed is not None:
                changed.write(normalized)
        return text if changed is None else changed.getvalue()

    def _nfc(self, piece: bytes) -> bytes:
        return self._normalize(piece.decode()).encode()


ENCODERS: dict[str, Callable[[Mapping[str, Any]], Encode]] = {"gigatoken": Gigatoken}
"""Makers of encoders, fastest first. Each takes the content of a `tokenizer.json`."""


def choose_encoder(
    sha256: str, spec: Mapping[str, Any], backend: HFTokenizer, tokens: Sequence[bytes]
) -> Encoder:
    """The first of `ENCODERS` whose ids are those of `backend`, else `backend` itself.

    `sha256` is of the `tokenizer.json`, `spec` its content, and `tokens` are the bytes of its ids.
    """

    dtype = _dtype_of(len(tokens))
    known = _known_ids(sha256)

    def reference(text: bytes) -> Ids:
        return np.array(backend.encode(text.decode(), add_special_tokens=False).ids, dtype)

    def of_trial(text: bytes) -> Ids:
        if text not in known:
            known[text] = reference(text)
        return known[text]

    rejected: dict[str, str] = {}
    for name, make in ENCODERS.items():
        try:
            encode = _normalizing(make, spec, backend)
            for text in trial_texts(tokens, [token["content"] for token in spec["added_tokens"]]):
                _compare(encode, of_trial, text)
        except ImportError:
            rejected[name] = "it is not installed"
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            rejected[name] = " ".join(str(error).split())[:120] or type(error).__name__
        else:
            give_back()  # ids of trial texts were large
            return Encoder(name, encode, rejected)
    return Encoder("tokenizers", encodes_in_pieces(spec, reference), rejected)


def _normalizing(
    make: Callable[[Mapping[str, Any]], Encode], spec: Mapping[str, Any], backend: HFTokenizer
) -> Encode:
    """The encoder that `make` makes, with the normalizer of `backend` if there is one."""
    bare = {**spec, "normalizer": None}
    encode = encodes_in_pieces(bare, make(bare))
    return Normalizing(backend, encode) if backend.normalizer else encode


@functools.lru_cache(maxsize=8)
def _known_ids(sha256: str) -> dict[bytes, Ids]:
    """Ids of trial texts that `tokenizers` has made for a file: it takes most of the time."""
    return {}


def _compare(encode: Encode, reference: Encode, text: str) -> None:
    data = text.encode()
    if not np.array_equal(encode(data), reference(data)):
        start = ascii(text[:20])
        raise UnsuitableError(f"it gives other ids for a text that begins with {start}")


def trial_texts(tokens: Sequence[bytes], added: Iterable[str]) -> Iterator[str]:
    """Texts on which encoders may differ.

    They hold every token as a word of its own and all in one string, added tokens, characters of
    all kinds beside letters, digits and blanks, contractions, numbers, and long words.
    """
    whole = [text for token in tokens if (text := token.decode(errors="ignore")).encode() == token]
    yield "\n".join(whole)
    yield "".join(random.Random(0).sample(whole, len(whole)))
    for token in added:
        yield from (token, f"a{token}b {token}  {token}\n")
    codes = (*range(0x600), *range(0x600, 0x3100, 7), *range(0x3100, 0x110000, 499))
    characters = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
    yield "".join(f"a{char}1{char} {char}{char}  !{char}\n" for char in characters)
    yield "I'll can't we've 'S 'LL x''s 1's\u2019s  \t\n \r\n\n  end \n"
    yield " ".join(digit * count for digit in "0123456789" for count in range(2, 12))
    yield " ".join(map(str, range(0, 10**7, 9973)))  # libraries read `\p{N}{1,3}+` differently
    for word in ("ab", "7", " ", "\n", "!", "é", "\u4e16", "\u0301"):
        yield f"x{word * 4000}y"


def _dtype_of(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32
