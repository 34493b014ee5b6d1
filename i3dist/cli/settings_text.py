"""A tree of settings as text: its names, --help, a commented file, errors.

A tree is a pydantic model whose fields are sections, which are models whose fields are settings.
Docstrings of sections and settings are their descriptions.
"""

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from i3dist.cli.paths import (
    Place,
    literal_name,
    literal_path,
    literal_place,
    optional_path,
    path_or_auto,
)
from i3dist.cli.settings_file import Literals, Nothing, write_values
from i3dist.cli.suggest import hint

Tree = type[BaseModel]
WIDTH = 80


def sections(tree: Tree) -> Iterator[tuple[str, Tree]]:
    """(name, type) of every section."""
    for name, field in tree.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        yield field.alias or name, field.annotation


def all_settings(tree: Tree) -> dict[str, FieldInfo]:
    """Every setting by its name ("train.steps"), in order."""
    return {
        f"{section}.{key}": field
        for section, group in sections(tree)
        for key, field in group.model_fields.items()
    }


def literal_settings(tree: Tree) -> Literals:
    """How a typed text becomes the value of each setting that is a path or a name."""
    readers = {
        Path: literal_path,
        Path | None: optional_path,
        Path | Literal["auto"]: path_or_auto,
        Place: literal_place,
        str: literal_name,
        str | None: literal_name,
    }
    return {
        name: reader
        for name, field in all_settings(tree).items()
        for kind, reader in readers.items()
        if field.annotation == kind
    }


def help_text(tree: Tree) -> str:
    """Every setting with its default and description, for --help."""
    defaults = tree().model_dump(mode="json", by_alias=True)
    lines = ["settings (section.key=value) and their defaults:"]
    for section, group in sections(tree):
        lines += ["", _wrapped(group.__doc__, f"{section}: ", "  ")]
        for key, field in group.model_fields.items():
            lines.append(f"  {section}.{key}={defaults[section][key]}")
            lines.append(_wrapped(field.description, " " * 6, " " * 6))
    return "\n".join(lines)


def commented_yaml(tree: Tree) -> str:
    """A settings file that holds every setting at its default, each under its description."""
    defaults = tree().model_dump(by_alias=True)
    lines = []
    for section, group in sections(tree):
        lines += ["", _wrapped(group.__doc__, "# ", "# "), f"{section}:"]
        for key, field in group.model_fields.items():
            lines.append(_wrapped(field.description, "  # ", "  # "))
            lines.append(f"  {write_values({key: defaults[section][key]})}".rstrip())
    return "\n".join(lines) + "\n"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _wrapped(text: str | None, first: str, rest: str) -> str:
    wrapper = textwrap.TextWrapper(WIDTH - 2, first, rest, break_on_hyphens=False)
    return wrapper.fill(_one_line(text))


def first_fault(error: ValidationError, tree: Tree, places: Mapping[str, str]) -> str:
    """The first fault of a validation as one line: place, key, value, legal range, remedy."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    # Tagged unions put their branch into the location; only setting names are wanted.
    names = [str(part) for part in fault["loc"]][:2]
    key = ".".join(names) or "the settings"
    place, value = places.get(key, ""), fault["input"]
    known = all_settings(tree)
    if fault["type"] == "extra_forbidden":
        inner = next(iter(value), None) if len(names) == 1 and isinstance(value, dict) else None
        full = f"{key}.{inner}" if inner else key
        cut = place and isinstance(value, Nothing)  # {layers: 12xrwkv,2xattention} has two keys
        advice = "; it has no value: put quotes around a value that has commas" if cut else ""
        return f"{place}unknown setting {key if place else full}{hint(full, known)}{advice}"
    legal = "; ".join(
        dict.fromkeys(
            other["msg"].removeprefix("Input ").removeprefix("Value error, ")
            for other in faults
            if [str(part) for part in other["loc"]][:2] == names
        )
    )
    if value is None or isinstance(value, Nothing):
        legal = "has no value: give one, or leave the setting out"
    meaning = f" ({_one_line(known[key].description)})" if key in known else ""
    return f"{place}setting {key}={repr(value)[:80]} {legal}{meaning}"
