"""From a YAML file and ``section.key=value`` words to plain nested values, not yet validated."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from i3dist.errors import UserError

MAX_LENGTH, MAX_VALUE_LENGTH, MAX_DEPTH = 1 << 16, 1 << 10, 4
PARSE_ERRORS = (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError)


def read_values(config: Path | None, overrides: Sequence[str]) -> Any:
    """What the file says, then what the words say.

    Raises:
        UserError: unreadable file, or a text that is not YAML or not for settings.
    """
    for word in overrides:
        if not re.fullmatch(r"[\w-]+\.[\w-]+=.*", word, re.DOTALL):
            raise UserError(f"setting {word[:80]!r} is not of the form section.key=value")
    try:
        text = config.read_text(encoding="utf-8") if config else "{}"
        for part in (text, *(word.partition("=")[2] for word in overrides)):
            _check(part)
        if isinstance(yaml.compose(text, yaml.SafeLoader), yaml.ScalarNode):
            raise ValueError("not sections with settings in them")
        tree = OmegaConf.merge(OmegaConf.create(text), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(tree, resolve=True)
    except OSError as error:
        raise UserError(f"cannot read settings {config}: {error.strerror}") from None
    except PARSE_ERRORS as error:
        where = f"{config}: " if config else ""
        raise UserError(f"settings cannot be parsed: {where}{_first_line(error)}") from None


def _check(text: str) -> None:
    """Refuse what settings never need: deep nesting can end the parser's process, names for nodes
    (&x, *x) can grow without bound, and "${" is looked into in quadratic time.

    Raises:
        ValueError, YAMLError: the text is not for settings, or not YAML.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH:,} characters")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"settings have no aliases (*{event.anchor})")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_VALUE_LENGTH:
            raise ValueError(f"a key or value longer than {MAX_VALUE_LENGTH:,} characters")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError("nested deeper than section.key=value")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
