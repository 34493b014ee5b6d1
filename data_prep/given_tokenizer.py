"""The tokenizer that `--tokenizer` names: a file, a folder, or a name on the hub.

Special tokens that it lacks are added behind its other tokens, whose ids stay what they are.
"""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from data_prep.retries import why
from i3dist.cli.paths import typed_path
from i3dist.data.tokenizer import SPECIAL_TOKENS, Tokenizer, read_file
from i3dist.errors import UserError

FILE_NAME = "tokenizer.json"
_PROBES = ("A cafe\u0301", " A\n\n", "\ufb01  \u212b ``A'' 1")
"""Texts in which a tokenizer that changes texts is likely to change something."""

_ON_HUB = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")


def typed_tokenizer(text: str) -> str | Path:
    """A path, or a name on the hub: OWNER/NAME where there is no such path.

    Raises:
        ArgumentTypeError: it begins with hf:// and is no such name.
    """
    if text.startswith("hf://"):
        if not _ON_HUB.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form hf://OWNER/NAME")
        return text
    path = typed_path(text)
    is_name = _ON_HUB.fullmatch(text) and not text.startswith(".") and not text.endswith(".json")
    return text if is_name and not os.path.lexists(path) else path


def given_tokenizer(place: str | Path) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer with all special tokens, and those that were added to it.

    Raises:
        UserError: it cannot be read, or does not serve; the message says why.
    """
    path = _from_hub(place) if isinstance(place, str) else place
    if path.is_dir():
        path /= FILE_NAME
    data, added = completed(read_file(path))
    tokenizer = Tokenizer(data, path)
    if dropout := json.loads(data)["model"].get("dropout"):
        raise UserError(
            f"{path}: its model has dropout {dropout:g}, so a text has other ids each time: name a "
            "tokenizer without it"
        )
    return tokenizer, added


def changed_text(tokenizer: Tokenizer) -> tuple[str, str] | None:
    """A text, and the other one that its ids stand for, of a tokenizer that changes texts.

    It may normalize them, as those of Qwen do, or put a space before them.
    """
    for text in _PROBES:
        if (other := tokenizer.decode(tokenizer.encode(text))) != text:
            return text, other
    return None


def completed(data: bytes) -> tuple[bytes, tuple[str, ...]]:
    """A `tokenizer.json` with all of `SPECIAL_TOKENS`, and those that it lacked.

    One that lacks none, or that cannot be understood, stays as it is.
    """
    try:
        spec = json.loads(data)
        vocab, tokens = spec["model"]["vocab"], spec["added_tokens"]
        ids = {**vocab, **{token["content"]: token["id"] for token in tokens}}
        free = max(ids.values()) + 1
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return data, ()
    missing = tuple(token for token in SPECIAL_TOKENS if token not in ids)
    if not missing:
        return data, ()
    tokens += [_special(token, number) for number, token in enumerate(missing, free)]
    return json.dumps(spec, indent=2, ensure_ascii=False).encode(), missing


def _special(content: str, number: int) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **plain, "special": True}


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    found = _ON_HUB.fullmatch(name)
    assert found
    try:
        return Path(hf_hub_download(found[1], FILE_NAME, revision=found[2]))
    except Exception as error:  # the library raises many kinds
        raise UserError(
            f"cannot read the tokenizer {name}: there is no such file, and from the hub it cannot "
            f"be had ({why(error)}): name a {FILE_NAME}"
        ) from None
