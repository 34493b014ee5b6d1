"""Kinds of things that users choose by name and can add to: layers, schedules, metrics, sources."""

import re
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

from i3dist.errors import UserError

Kind = TypeVar("Kind")
PLAIN = "[a-z][a-z0-9_-]*"


class Registry(dict[str, Kind], Generic[Kind]):
    """Kinds by name.

    Args:
        what: names them in messages: "layer kind".
        names: pattern of the names.
        reserved: names that no kind may have.
    """

    def __init__(self, what: str, names: str = PLAIN, reserved: Collection[str] = ()) -> None:
        super().__init__()
        self.what, self.names, self.reserved = what, names, reserved

    def register(self, name: str) -> Callable[[Kind], Kind]:
        """Decorator that adds a kind under a name.

        Raises:
            UserError: the name is taken, or is not of the form.
        """

        def add(kind: Kind) -> Kind:
            if not re.fullmatch(self.names, name):
                raise UserError(f"{self.what} {name!r} needs a name of the form {self.names}")
            if name in self or name in self.reserved:
                raise UserError(f"there already is a {self.what} {name!r}: choose another name")
            self[name] = kind
            return kind

        return add

    def of(self, name: str, place: str = "") -> Kind:
        """The kind of a name; `place` begins the line about an unknown one.

        Raises:
            UserError: there is none; the message lists those there are.
        """
        if name not in self:
            raise UserError(f"{place}unknown {self.what} {name!r}: use {self.choices()}")
        return self[name]

    def checked(self, name: str) -> str:
        """The name, where there is such a kind; a validator for settings.

        Raises:
            ValueError: there is none; the message lists those there are.
        """
        if name not in self:
            raise ValueError(f"should be {self.choices()}")
        return name

    def choices(self) -> str:
        """What can be chosen, as a message says it."""
        return f"{', '.join(sorted(self))}, or one of your own with --extend FILE.py"
