"""The tokenizer: byte-level BPE, stored as the `tokenizer.json` of the `tokenizers` library.

Ids are those of `tokenizers`. `i3dist/data/encoders.py` finds a library that computes the same ids
faster.
"""

import codecs
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from itertools import count
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import ByteLevel

from i3dist.data.encoders import Encoder, choose_encoder
from i3dist.data.folder import Folder, open_file
from i3dist.data.long_texts import Ids
from i3dist.errors import UserError

SPECIAL_TOKENS: tuple[str, ...] = (
    "<UNK>",
    "<PAD>",
    "<BOS>",
    "<EOS>",
    "<|im_start|>",
    "<|im_end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
)

_MAX_FILE_BYTES = 1 << 28
_FEW_BYTES = 1 << 20  # `tokenizers` encodes so many in the time in which an encoder is chosen
_LARGEST_ID = 1 << 24

_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
"""Settings of a model of `tokenizers` that must be empty: decoding takes what they add for text."""


class Tokenizer:
    """Text to token ids and back. Text never makes special ids: "<BOS>" in a text stays text."""

    def __init__(self, data: bytes, path: Folder) -> None:
        """Build from the bytes of the `tokenizer.json` at `path`."""
        self.path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.data = data
        """The bytes of the file."""
        self._backend = _parse(data, path)
        self._backend.encode_special_tokens = True
        self._encoded = 0  # bytes
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocab)
        if max(vocab.values(), default=0) > _LARGEST_ID:  # `to_str` counts up to it
            raise UserError(f"{path}: an id is larger than {_LARGEST_ID:,}")
        _check_vocab(vocab, self._backend, path)
        self.bos_id, self.eos_id, self.pad_id = (vocab[t] for t in ("<BOS>", "<EOS>", "<PAD>"))
        self.special_ids: dict[str, int] = {token: vocab[token] for token in SPECIAL_TOKENS}
        """Id of each special token. Chat tokens are made only from here, never from text."""
        self._bytes = _bytes_of_ids(vocab, self._backend, path)
        made = [token for token in SPECIAL_TOKENS if self._is_made_of_text(token)]
        if made:
            names = " ".join(made)
            raise UserError(
                f"{path}: it makes special ids out of plain text ({names}); train another"
            )

    @classmethod
    def load(cls, path: Folder) -> Self:
        """Read a `tokenizer.json`.

        Raises:
            UserError: it cannot be read, is not byte-level, or lacks special tokens (listed).
        """
        return cls(read_file(path), path)

    def encodes_like(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids, whatever else their files say."""
        aside = {"version", "truncation", "padding", "post_processor"}
        mine, theirs = (
            {key: part for key, part in tokenizer._spec.items() if key not in aside}
            for tokenizer in (self, other)
        )
        return mine == theirs

    def _is_made_of_text(self, token: str) -> bool:
        ids = self._backend.encode(token, add_special_tokens=False).ids
        return not set(self.special_ids.values()).isdisjoint(ids)

    @property
    def _spec(self) -> dict[str, Any]:
        """The tokenizer as `tokenizers` writes it, whatever the form of the file. It is large."""
        spec: dict[str, Any] = json.loads(self._backend.to_str())
        return spec

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder in use. It is chosen when it is first needed: choosing compares ids."""
        return choose_encoder(self.sha256, self._spec, self._backend, self._bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, never special ids. A lone surrogate in the text is a `UserError`."""
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise UserError("the text is not valid Unicode: it has a lone surrogate") from None
        self._encoded += len(data)
        if self._encoded <= _FEW_BYTES and "encoder" not in vars(self):
            return self._backend.encode(text, add_special_tokens=False).ids
        return self.encode_utf8(data).tolist()

    def encode_utf8(self, text: bytes) -> Ids:
        """Ids of plain text in valid UTF-8, [T]: uint16, or uint32 for more than 65,536 entries.

        The caller has checked that the UTF-8 is valid.
        """
        return self.encoder.encode(text)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Text of `ids`. Special tokens give no text; bytes that are not UTF-8 give U+FFFD."""
        data = b"".join(self._bytes[_checked(int(i), len(self._bytes))] for i in ids)
        return data.decode("utf-8", errors="replace")

    def token_bytes(self) -> NDArray[np.int32]:
        """Number of UTF-8 bytes of each id, int32 [vocab_size]; 0 for special tokens."""
        return np.array([len(token) for token in self._bytes], dtype=np.int32)

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder that takes ids one by one, as they are generated."""
        return StreamDecoder(self._bytes)


def read_file(path: Folder) -> bytes:
    """The bytes of a `tokenizer.json`.

    Raises:
        UserError: it cannot be read, or is too large.
    """
    try:
        with open_file(path, _MAX_FILE_BYTES) as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise UserError(f"{path} is too large to be a tokenizer.json")
    return data


class StreamDecoder:
    """Decodes ids one by one and returns whole characters only."""

    def __init__(self, bytes_of_ids: Sequence[bytes]) -> None:
        self._bytes = bytes_of_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        return self._decoder.decode(self._bytes[_checked(token, len(self._bytes))])

    def finish(self) -> str:
        """The text of the incomplete character at the end, U+FFFD, if there is one."""
        return self._decoder.decode(b"", final=True)


def _checked(token: int, vocab_size: int) -> int:
    if not 0 <= token < vocab_size:
        raise ValueError(f"token id {token} is outside the vocabulary of {vocab_size}")
    return token


def _parse(data: bytes, path: Folder) -> HFTokenizer:
    try:
        backend = HFTokenizer.from_str(data.decode())
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a tokenizer.json: it is not UTF-8 text") from None
    except BaseException as error:
        # The library raises bare Exception for bad content, and a Rust panic is not even that.
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a tokenizer.json: {reason}") from None
    backend.no_padding()
    backend.no_truncation()
    return backend


def _check_vocab(vocab: dict[str, int], backend: HFTokenizer, path: Folder) -> None:
    if not isinstance(backend.decoder, ByteLevel):
        raise UserError(f"{path} is not a byte-level tokenizer, so not every text round-trips")
    for key in _AFFIXES:
        if value := getattr(backend.model, key, None):
            raise UserError(
                f"{path}: its model has {key} {value!r}, which decoding takes for text: name a "
                "tokenizer without it"
            )
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise UserError(f"{path} lacks the special tokens {' '.join(missing)}")
    if any(char not in vocab for char in _BYTE_CHARACTERS):
        raise UserError(f"{path} lacks some of the 256 single bytes, so not every text round-trips")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{path}: its ids do not run from 0 to {len(vocab) - 1}")


def _byte_characters() -> str:
    """The character of each byte in a byte-level vocabulary.

    Printable Latin-1 characters stand for their own bytes; U+0100 and on stand for the other bytes.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = count(0x100)
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


_BYTE_CHARACTERS = _byte_characters()
_BYTE_OF_CHARACTER = codecs.charmap_build(_BYTE_CHARACTERS)


def _bytes_of_ids(vocab: dict[str, int], backend: HFTokenizer, path: Folder) -> list[bytes]:
    """The bytes of each id: none for special tokens, the text of other added tokens."""
    added = backend.get_added_tokens_decoder()
    table = [b""] * len(vocab)
    for token, number in vocab.items():
        if number in added:
            table[number] = b"" if added[number].special else token.encode()
            continue
        try:
            table[number] = codecs.charmap_encode(token, "strict", _BYTE_OF_CHARACTER)[0]
        except UnicodeEncodeError:
            raise UserError(
                f"{path}: its token {token!r} is neither bytes nor an added token"
            ) from None
    return table
