"""From a YAML file and ``section.key=value`` words to plain nested values, not yet validated.

YAML gives the structure and the text of each value. What a text means is decided here: YAML itself
would read 0100 as 64, 1:30 as 90, and a folder called 2024-01-01 as a date.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from yaml.reader import ReaderError

from i3dist.cli.paths import literal_path, path_text
from i3dist.cli.suggest import hint, suggest
from i3dist.errors import UserError
from i3dist.files import regular

MAX_LENGTH, MAX_VALUE_LENGTH, MAX_DEPTH = 1 << 16, 1 << 12, 4
NULLS = ("", "~", "null", "Null", "NULL")
# How the text of a path or a name is read, by setting; a `ValueError` says what is wrong with it.
Literals = Mapping[str, Callable[[str], Any]]


@dataclass(frozen=True, repr=False)
class Nothing:
    """A text that gives no value: it is empty, ~ or null."""

    text: str

    def __repr__(self) -> str:
        """As it was typed."""
        return self.text


class Said(NamedTuple):
    """What was said about settings, and where."""

    values: dict[str, dict[str, Any]]
    places: dict[str, str]
    """By section or setting that the file holds: "FILE, line 7: "."""


def read_values(
    config: Path | None, words: Sequence[str], known: Collection[str], literals: Literals
) -> Said:
    """Read the file, then the words, which win.

    Args:
        config: the file.
        words: section.key=value each. The value is YAML; of a path or name it is taken literally.
        known: the settings there are, for suggestions.
        literals: those of them that are paths and names.

    Raises:
        UserError: unreadable file, or a text that is not YAML or not for settings.
    """
    reader = _Reader(known, literals)
    said = reader.file(config) if config else Said({}, {})
    for word in words:
        match = re.fullmatch(r"([\w-]+)\.([\w-]+)=(.*)", word, re.DOTALL)
        if match is None:
            name = word.partition("=")[0]
            meant = "" if name in known else hint(name, known)
            raise UserError(f"setting {word[:80]!r} is not of the form section.key=value{meant}")
        section, key, text = match.groups()
        said.values.setdefault(section, {})[key] = reader.word(f"{section}.{key}", text)
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


class _TextError(ValueError):
    """What is wrong with a text, and the line of the text."""

    def __init__(self, problem: str, line: int = 1) -> None:
        super().__init__(problem)
        self.line = line


@dataclass(frozen=True)
class _Reader:
    known: Collection[str]
    literals: Literals

    def word(self, name: str, text: str) -> Any:
        """The value of a word; raises `UserError`."""
        try:
            if name in self.literals:
                return self.literals[name](text)
            node = _compose(text)
            return Nothing(text) if node is None else self._value(name, node)
        except ValueError as error:
            raise UserError(f"setting {name}={text[:80]!r}: {error}") from None

    def file(self, config: Path) -> Said:
        """All settings of a file; raises `UserError`, with the line where there is one."""
        said = Said({}, {})
        try:
            for section, line, group in self._items(
                "", _compose(regular(config).read_text("utf-8"))
            ):
                said.places[section] = f"{config}, line {line}: "
                values = said.values[section] = {}
                for key, line, node in self._items(f"{section}.", group):
                    said.places[f"{section}.{key}"] = f"{config}, line {line}: "
                    values[key] = self._value(f"{section}.{key}", node)
        except OSError as error:
            raise UserError(f"cannot read settings {config}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise UserError(f"{config}, line {line}: cannot be parsed: not UTF-8 text") from None
        except _TextError as error:
            raise UserError(f"{config}, line {error.line}: {error}") from None
        return said

    def _items(self, prefix: str, node: yaml.Node | None) -> Iterator[tuple[str, int, yaml.Node]]:
        """Key, line and value of each entry of the file (no prefix) or of a section ("train.")."""
        if node is None or (prefix and _is_null(node)):  # nothing but comments
            return
        if not isinstance(node, yaml.MappingNode):
            name = prefix.rstrip(".")
            meant = suggest(name, self.known)
            section, key = (meant or ["train.steps"])[0].split(".")
            entry = f"{section}: {{{key}: {str(node.value)[:80] if meant else 300}}}"
            _refuse(node, f"{name or 'the file'} has no settings in it: write them as {entry}")
        seen = set()
        for key, value in node.value:
            name = prefix + _plain(key, f"{prefix or 'a section'} is not followed by a name")
            if name in seen:
                _refuse(key, f"{name} is there twice: keep one")
            seen.add(name)
            yield key.value, key.start_mark.line + 1, value

    def _value(self, name: str, node: yaml.Node) -> Any:
        """What a setting's text means: nothing, a number, a path, or the text."""
        text, literal = _plain(node, f"{name} is not one plain value"), self.literals.get(name)
        if _is_null(node) and not (text == "~" and literal is literal_path):
            return Nothing(text)
        if literal:
            try:
                return literal(text)
            except ValueError as error:
                _refuse(node, f"setting {name}={text[:80]!r}: {error}")
        if "${" in text:
            _refuse(node, f"{name} cannot be parsed: ${{...}} is no value, write the value itself")
        return _number(text)


def _plain(node: yaml.Node, problem: str) -> str:
    """The text of a key or value that is one; refuses others, and explicit types (!!int 3)."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
        _refuse(node, problem)
    return str(node.value)


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

    Refuses deep nesting, which can crash the parser, and aliases (&x, *x), which can grow without
    bound.

    Raises:
        _TextError: the text is not for settings, or not YAML.
    """
    if len(text) > MAX_LENGTH:
        raise _TextError(f"longer than {MAX_LENGTH:,} characters")
    depth = 0
    try:
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
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _TextError("cannot be parsed: a character that cannot be printed", line) from None
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, str(error.problem)
        remedy = "; indent with spaces" if "'\\t'" in problem else ""
        line = mark.line + 1 if mark else 1
        raise _TextError(f"cannot be parsed: {problem}{remedy}", line) from None


def _refuse(at: yaml.Node | yaml.Event, problem: str) -> NoReturn:
    mark: Any = at.start_mark
    raise _TextError(problem, mark.line + 1)
