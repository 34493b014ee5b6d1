"""Kinds of things that users choose by name and can add to: layers, schedules, metrics, sources."""

from collections.abc import Callable
from typing import Generic, TypeVar

from i3dist.errors import UserError

Kind = TypeVar("Kind")


class Registry(dict[str, Kind], Generic[Kind]):
    """Kinds by name. `what` names them in messages: "layer kind"."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def register(self, name: str) -> Callable[[Kind], Kind]:
        """Decorator that adds a kind under a name.

        Raises:
            UserError: the name is taken.
        """

        def add(kind: Kind) -> Kind:
            if name in self:
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
