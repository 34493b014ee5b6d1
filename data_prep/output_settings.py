"""The settings that an output was made with, as `shard.json` holds them, and how two differ."""

import re
from collections.abc import Set
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from data_prep.evidence import Saved
from data_prep.formats import FORMATS
from data_prep.sources import TEXT
from i3dist.data.token_types import TokenType, token_type

TRAIN, VALID = "train", "valid"
OTHER_CONTENT = "from other content of the same source"
_LICENSES = ("license", "valid_license")
_IF_USED = Field(exclude_if=lambda value: value is None)
_LAYOUT = 2
"""Of the files in `.work`. An output that is complete serves whatever its layout was."""
_LAYOUT_OF_DISTINCT = 3
"""The same with `--deduplicate`, whose rules have changed once more."""


class OutputSettings(Saved):
    """Everything that decides the bytes of the output.

    `revision` is the source's outline: the hub's commit, or a digest of the files' names and sizes.
    Older versions of this tool wrote a digest of the files' content, and no `tokenizer_sample`:
    they trained on the first texts of the source. `chunks_per_shard` is None until it has been
    chosen. The last ones are missing where they are not used. `valid` is the name of the source of
    the validation split, and `license` decides no byte.
    """

    layout: int = _LAYOUT
    source: str
    revision: str
    tokenizer: Annotated[str, Field(pattern="^(trained|sha256 [0-9a-f]{64})$")]
    tokenizer_sample_mb: int
    tokenizer_sample: Literal["first", "even"] = "first"
    vocab_size: int
    chunk_length: int
    chunks_per_shard: int | None
    valid_fraction: float
    seed: int
    # Not written where it is the default, as older versions of this tool did not know it.
    format: Literal["text", "chat"] = Field(TEXT, exclude_if=lambda name: name == TEXT)
    # Earlier versions took an empty condition, which keeps all.
    where: Annotated[str | None, _IF_USED, BeforeValidator(lambda text: text or None)] = None
    min_tokens: Annotated[int | None, _IF_USED] = None
    max_tokens: Annotated[int | None, _IF_USED] = None
    deduplicate: Annotated[Literal[True] | None, _IF_USED] = None
    valid: Annotated[str | None, _IF_USED] = None
    valid_revision: Annotated[str | None, _IF_USED] = None
    license: Annotated[str | None, _IF_USED] = None
    valid_license: Annotated[str | None, _IF_USED] = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order in which their manifests are written."""
        return (VALID, TRAIN) if self.valid_fraction or self.valid else (TRAIN,)

    @property
    def chooses(self) -> bool:
        """Whether documents are chosen, so that what was dropped is recorded."""
        return any((self.where, self.min_tokens, self.max_tokens, self.deduplicate, self.valid))

    def source_of(self, split: str) -> str:
        """Name of the source of a split."""
        return self.valid if self.valid and split == VALID else self.source

    @property
    def has_content_digest(self) -> bool:
        """Whether `revision` is the digest that older versions wrote for files."""
        return re.fullmatch("[0-9a-f]{64}", self.revision) is not None

    def token_type(self, vocab_size: int) -> TokenType:
        """How shards store tokens of a vocabulary."""
        return token_type(vocab_size, has_mask=FORMATS[self.format].has_mask)

    def difference(self, other: "OutputSettings", free: Set[str] = frozenset()) -> str | None:
        """The first setting that differs from `other`'s, in words; `free` ones may differ."""
        for name in ("valid", *type(self).model_fields):  # --valid sets --valid-fraction
            value, theirs = getattr(self, name), getattr(other, name)
            if value == theirs or name in ("layout", *_LICENSES, *free):
                continue
            if name in ("revision", "valid_revision"):
                return OTHER_CONTENT
            return _in_words(name.replace("_", "-"), value, theirs)
        return None


def layout(deduplicate: bool | None) -> int:
    """The layout of what this version writes into `.work`."""
    return _LAYOUT_OF_DISTINCT if deduplicate else _LAYOUT


def _in_words(name: str, value: object, theirs: object) -> str:
    """That a setting was `value`, and is not now."""
    if value is None or theirs is None:
        return f"without --{name}" if value is None else f"with --{name}"
    return f"with {name} {value}, not {theirs}"
