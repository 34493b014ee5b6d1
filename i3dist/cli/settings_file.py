"""From a YAML file and ``section.key=value`` words to plain nested values, not yet validated.

YAML gives the structure and each value's text. What a text means is decided here: YAML's own
guesses would read 0100 as 64, 1:30 as 90, and a folder called 2024-01-01 as a date.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from yaml.reader import ReaderError

from i3dist.cli.paths import literal_path, path_text
from i3dist.errors import UserError

MAX_LENGTH, MAX_VALUE_LENGTH, MAX_DEPTH = 1 << 16, 1 << 12, 4
NULLS = ("", "~", "null", "Null", "NULL")
TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq")}
# By setting, what the text of a path or a name becomes; a `ValueError` says what is wrong with it.
Literals = Mapping[str, Callable[[str], Any]]


@dataclass(frozen=True, repr=False)
class Nothing:
    """What a text means that gives no value: it is empty, ~ or null."""

    text: str

    def __repr__(self) -> str:
        """As it was typed."""
        return self.text


class Said(NamedTuple):
    """What was said about settings, and where."""

    values: dict[str, dict[str, Any]]
    places: dict[str, str]
    """Of a section or setting that the file holds, by its name: "FILE, line 7: "."""


def read_values(config: Path | None, words: Sequence[str], literals: Literals) -> Said:
    """What the file says, then what the words say.

    Args:
        config: the file.
        words: section.key=value each. The value is YAML, but of a path or name the text as typed.
        literals: the settings that are paths and names.

    Raises:
        UserError: unreadable file, or a text that is not YAML or not for settings.
    """
    said = _read_file(config, literals) if config else Said({}, {})
    for word in words:
        match = re.fullmatch(r"([\w-]+)\.([\w-]+)=(.*)", word, re.DOTALL)
        if match is None:
            raise UserError(f"setting {word[:80]!r} is not of the form section.key=value")
        section, key, text = match.groups()
        said.values.setdefault(section, {})[key] = _read_word(f"{section}.{key}", text, literals)
        said.places.pop(f"{section}.{key}", None)
    return said


def write_values(values: Mapping[str, Any]) -> str:
    """Nested values as YAML, which `read_values` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


class _Dumper(yaml.SafeDumper):
    """Writes paths as they are typed, and escapes what cannot be printed."""

    def text(self, text: str) -> yaml.Node:
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.text)
_Dumper.add_multi_representer(Path, lambda dumper, path: dumper.text(path_text(path)))


class _Refused(yaml.MarkedYAMLError):
    """It is YAML, but not for settings; the problem is said in full."""


def _read_word(name: str, text: str, literals: Literals) -> Any:
    """The value of a word; raises `UserError`."""
    try:
        if name in literals:
            return literals[name](text)
        node = _compose(text)
        return Nothing(text) if node is None else _value(name, node, literals)
    except ValueError as error:
        raise UserError(f"setting {name}={text[:80]!r}: {error}") from None
    except yaml.YAMLError as error:
        _, reason = _explain(error, text)
        raise UserError(f"setting {name}={text[:80]!r}: {reason}") from None


def _read_file(config: Path, literals: Literals) -> Said:
    """All settings of a file; raises `UserError`, with the line where there is one."""
    said, text = Said({}, {}), ""
    try:
        text = config.read_text(encoding="utf-8")
        for section, at, settings in _items("", _compose(text)):
            said.places[section] = f"{config}, line {at}: "
            said.values[section] = {}
            for key, at, node in _items(f"{section}.", settings):
                said.places[f"{section}.{key}"] = f"{config}, line {at}: "
                said.values[section][key] = _value(f"{section}.{key}", node, literals)
    except OSError as error:
        raise UserError(f"cannot read settings {config}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{config}, line {line}: cannot be parsed: not UTF-8 text") from None
    except yaml.YAMLError as error:
        line, reason = _explain(error, text)
        raise UserError(f"{config}, line {line}: {reason}") from None
    return said


def _items(prefix: str, node: yaml.Node | None) -> Iterator[tuple[str, int, yaml.Node]]:
    """Key, line and value of each entry of the file (no prefix) or of a section ("train.")."""
    if node is None or (prefix and _is_null(node)):  # nothing but comments
        return
    if not isinstance(node, yaml.MappingNode):
        what = prefix.rstrip(".") or "the file"
        _refuse(node, f"{what} has no settings in it: write them as train: {{steps: 300}}")
    seen = set()
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if not isinstance(key, yaml.ScalarNode) or key.tag not in TAGS:
            _refuse(key, f"{prefix or 'a section'} is not followed by a name")
        if name in seen:
            _refuse(key, f"{name} is there twice: keep one")
        seen.add(name)
        yield key.value, key.start_mark.line + 1, value


def _value(name: str, node: yaml.Node, literals: Literals) -> Any:
    """What a setting's text means: nothing, a number, a path, or the text."""
    if not isinstance(node, yaml.ScalarNode) or node.tag not in TAGS:
        _refuse(node, f"{name} is not one plain value")
    is_home = node.value == "~" and literals.get(name) is literal_path
    if _is_null(node) and not is_home:
        return Nothing(node.value)
    if name in literals:
        try:
            return literals[name](node.value)
        except ValueError as error:
            _refuse(node, f"setting {name}={node.value[:80]!r}: {error}")
    if "${" in node.value:
        _refuse(node, f"{name} cannot be parsed: ${{...}} is no value, write the value itself")
    return _number(node.value)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULLS


def _number(text: str) -> Any:
    """The number that people mean by a text: 0100 is a hundred, 0x10 sixteen; or the text."""
    for read in (int, lambda digits: int(digits, 0), float):
        with suppress(ValueError):
            return read(text)
    return text


def _compose(text: str) -> yaml.Node | None:
    """The nodes of a text, each value as its text; None where there is nothing.

    Refuses what settings never need: deep nesting can end the parser's process, and names for nodes
    (&x, *x) can grow without bound.

    Raises:
        YAMLError: the text is not for settings, or not YAML.
    """
    if len(text) > MAX_LENGTH:
        raise _Refused(problem=f"longer than {MAX_LENGTH:,} characters")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        if isinstance(event, yaml.AliasEvent):
            _refuse(event, f"settings have no aliases (*{event.anchor})")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_VALUE_LENGTH:
            _refuse(event, f"a key or value longer than {MAX_VALUE_LENGTH:,} characters")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            _refuse(event, "nested deeper than section.key=value")
    return yaml.compose(text, yaml.BaseLoader)


def _refuse(at: yaml.Node | yaml.Event, problem: str) -> NoReturn:
    mark: Any = at.start_mark
    raise _Refused(problem=problem, problem_mark=mark)


def _explain(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """(line, reason) of what is wrong with a text."""
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return line, "cannot be parsed: it has a character that cannot be printed"
    assert isinstance(error, yaml.MarkedYAMLError)
    mark, problem = error.problem_mark or error.context_mark, str(error.problem)
    if not isinstance(error, _Refused):
        hint = "; indent with spaces" if "'\\t'" in problem else ""
        problem = f"cannot be parsed: {problem}{hint}"
    return (mark.line + 1 if mark else 1), problem
