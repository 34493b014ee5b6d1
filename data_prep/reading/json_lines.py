r"""Lines of jsonl as Python objects.

A `str` with one character beyond Latin-1 takes two or four bytes for each of its characters. So a
long line is parsed as bytes: JSON's own signs are ASCII, and so are escapes such as `\n`. Its long
texts stay bytes.
"""

import codecs
import json
import re
from decimal import Decimal
from typing import Any, NamedTuple

from i3dist.errors import UserError

_LONG_LINE, _LONG_TEXT = 1 << 22, 1 << 16
_MARK = codecs.BOM_UTF8
_OTHER_ESCAPE = re.compile(rb"\\u(?!00[0-7])")
"""Perhaps an escape of a character that is not ASCII."""


class Line(NamedTuple):
    """A line, or the bytes of one as characters of Latin-1."""

    text: str
    is_bytes: bool = False


def decoded(line: bytes, may_be_bytes: bool) -> Line:
    """A line without its byte-order mark. Bad bytes become lone surrogates: see `usable_text`."""
    line = line.removeprefix(_MARK)
    is_long = len(line) > _LONG_LINE and b"{" in line  # else it may be blank
    if may_be_bytes and is_long and not _OTHER_ESCAPE.search(line):
        return Line(line.decode("latin-1"), is_bytes=True)
    return Line(_text(line))


def parse(line: Line, place: str, key: str) -> dict[str, Any]:
    """The object in a line at `place`; strings may be UTF-8 bytes if `line` is.

    Raises:
        UserError: it is no JSON, is nested too deep, or has no `key`.
    """
    try:
        fields = _loads(line.text)
        if line.is_bytes:
            fields = _with_texts(fields)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deep, or a number too long")
        raise UserError(f"{place}: broken JSON ({reason}); repair or remove it") from None
    if not isinstance(fields, dict) or key not in fields:
        raise UserError(f"{place}: no key {key!r} (--text-column names the one with the text)")
    return fields


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # a whole number with more digits than `int` takes
        return json.loads(text, parse_int=Decimal)


def _with_texts(value: Any) -> Any:
    """A value whose strings are bytes, as characters of Latin-1, with the texts of these bytes."""
    if isinstance(value, str):
        data = value.encode("latin-1")
        return data if len(data) > _LONG_TEXT else _text(data)
    if isinstance(value, list):
        return [_with_texts(item) for item in value]
    if isinstance(value, dict):
        return {_text(key.encode("latin-1")): _with_texts(item) for key, item in value.items()}
    return value


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
