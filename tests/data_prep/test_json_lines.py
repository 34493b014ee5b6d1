"""A long line of jsonl gives the same document as a short one, in bytes instead of characters."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep.formats import FORMATS
from data_prep.reading import json_lines
from data_prep.sources import CHAT, TEXT
from i3dist.errors import UserError

texts = st.text(st.one_of(st.characters(), st.sampled_from('é世\U0001f600"\\\n\x00\x7f\x80u00e9')))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(texts, inner)),
    max_leaves=5,
)


def parsed(line: bytes, key: str, monkeypatch: pytest.MonkeyPatch, long: int) -> Any:
    """What becomes of a line, if those of more than `long` bytes are long."""
    monkeypatch.setattr(json_lines, "_LONG_LINE", long)
    monkeypatch.setattr(json_lines, "_LONG_TEXT", len("assistant"))  # a role is no long text
    found = json_lines.decoded(line, may_be_bytes=True)
    if not long:
        assert found.is_bytes or b"\\u" in line or not line.strip(b"\xef\xbb\xbf")
    try:
        fields = json_lines.parse(found, "line 1", key)
    except UserError as error:
        return str(error).partition("(")[0]
    others = {name: value for name, value in fields.items() if name != key}
    text = fields[key]
    return FORMATS[TEXT].usable(text), FORMATS[CHAT].usable(text), repr(as_text(others))


def as_text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, list):
        return [as_text(item) for item in value]
    return {k: as_text(v) for k, v in value.items()} if isinstance(value, dict) else value


@settings(suppress_health_check=[*HealthCheck], deadline=None, max_examples=300)
@given(
    fields=st.dictionaries(texts, values, max_size=3),
    text=st.one_of(values, st.lists(st.builds(dict, role=st.just("assistant"), content=texts))),
    key=texts,
    escaped=st.booleans(),
    damage=st.binary(max_size=2),
    marked=st.booleans(),
    place=st.integers(0, 99),
)
@example({}, "\u2003", "text", False, b"", False, 0)
@example({}, "a\x80\x0c\U0001f600", "text", False, b"", True, 0)
@example({}, "caf\xe9 \\u00e9", "text", False, b"", False, 0)
@example({}, [{"role": "assistant", "content": "é"}], "text", False, b"", False, 0)
@example({}, [{"role": "assistant", "content": "é"}], "text", False, b"\xff", False, 40)
def test_a_long_line_is_the_same_document(
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    text: Any,
    key: str,
    escaped: bool,
    damage: bytes,
    marked: bool,
    place: int,
) -> None:
    line = json.dumps(fields | {key: text}, ensure_ascii=escaped)
    data = line.encode("utf-8", "surrogatepass")
    place = min(place, len(data))
    data = b"\xef\xbb\xbf" * marked + data[:place] + damage + data[place:]
    assert parsed(data, key, monkeypatch, 0) == parsed(data, key, monkeypatch, 1 << 20)


@pytest.mark.parametrize("depth", [100, 600, 900, 10**5])
def test_a_long_line_that_is_nested_too_deep_is_one_line(
    monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """Also where the parser takes more levels than what makes texts of bytes."""
    monkeypatch.setattr(json_lines, "_LONG_LINE", 0)
    line = b'{"text": "a", "others": ' + b"[" * depth + b"]" * depth + b"}"
    try:
        fields = json_lines.parse(json_lines.decoded(line, may_be_bytes=True), "line 1", "text")
    except UserError as error:
        assert depth > 100 and "nested too deep" in str(error)
    else:
        assert fields["text"] == "a" and depth < 10**5


def test_a_long_line_may_be_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_LONG_LINE", 0)
    assert json_lines.decoded("\u3000\xa0\n".encode(), may_be_bytes=True).text.isspace()
