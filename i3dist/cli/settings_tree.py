"""A typed tree of settings: read it from a file and words, look at it, write it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from i3dist.cli.settings_file import read_values, write_values
from i3dist.cli.settings_text import all_settings, first_fault, literal_settings
from i3dist.errors import UserError


class Section(BaseModel):
    """A frozen group of settings. Docstrings of fields are what ``--help`` shows."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class SettingsTree(Section):
    """A tree whose fields are sections."""

    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls, config: Path | None = None, overrides: Sequence[str] = ()) -> Self:
        """Build the tree from a YAML file and ``section.key=value`` words.

        Raises:
            UserError: unreadable file, unknown key or illegal value. The line names the setting,
                and file and line where it is in the file.
        """
        said = read_values(config, overrides, all_settings(cls), literal_settings(cls))
        tree = cls.build(said.values, said.places)
        tree._places = said.places
        return tree

    @classmethod
    def build(cls, values: Any, places: Mapping[str, str] | None = None) -> Self:
        """Validate a plain nested dict; `places` says where sections and settings come from.

        Raises:
            UserError: unknown key or illegal value.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(first_fault(error, cls, places or {})) from None

    def place_of(self, name: str) -> str:
        """How a line about a setting begins: "FILE, line 7: " if `load` read it there, or ""."""
        return self._places.get(name, "")

    def __eq__(self, other: object) -> bool:
        """Whether all values are equal, wherever they were read."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict as JSON has it, in the names that users type."""
        return self.model_dump(mode="json", by_alias=True)

    def flat(self) -> dict[str, Any]:
        """One entry per setting: {"train.steps": 20000, ...}."""
        return {
            f"{section}.{key}": value
            for section, fields in self.to_dict().items()
            for key, value in fields.items()
        }

    def given(self) -> set[str]:
        """The settings that were given a value; the others have their defaults."""
        values = self.model_dump(by_alias=True, exclude_unset=True)
        return {f"{section}.{key}" for section, fields in values.items() for key in fields}

    def to_yaml(self) -> str:
        """The tree as YAML, which `load` reads back to an equal tree."""
        return write_values(self.model_dump(by_alias=True))

    def with_values(self, **changes: Any) -> Self:
        """A copy with settings replaced: ``with_values(**{"train.lanes": 8})``."""
        values = self.model_dump(by_alias=True)
        for name, value in changes.items():
            section, key = name.split(".")
            values[section][key] = value
        return self.build(values)
