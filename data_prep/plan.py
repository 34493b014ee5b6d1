"""How the source of a begun output was cut into parts, so that its parts stay what they are.

Parts follow from the sizes of all files. When a broken file is repaired, its size changes, and the
parts of other files may then be cut elsewhere, although what was made of them is still good. So
the first run writes down which pieces of files each part reads. Later only files that are cut in
another way now change the parts that read them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from data_prep.evidence import Saved
from data_prep.ranges import divided
from data_prep.sources import Part, Place
from i3dist.files import write_whole


class Plan(Saved):
    """The pieces of files that each part reads; nothing of parts that do not read files."""

    parts: tuple[tuple[Place, ...], ...]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Self:
        """The plan by which these parts were made."""
        return cls(parts=tuple(part.places for part in parts))

    def write(self, path: Path) -> None:
        """Write the plan."""
        write_whole(path, self.model_dump_json().encode())

    def arranged(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Parts of a source, arranged as planned: as many parts, with the same numbers.

        The pieces of a file that is cut in another way now go to the parts that had its former
        pieces. Where the source has other files, or is not made of files, the parts stay as given.
        """
        if not all(part.places for part in parts):
            return parts
        pieces = [piece for part in parts for piece in part.split()]
        by_place = {piece.places[0]: piece for piece in pieces}
        groups = self._groups(list(by_place)) if len(by_place) == len(pieces) else None
        if groups is None:
            return parts
        return [
            by_place[min(group)].of([by_place[place] for place in sorted(group)])
            if group
            else pieces[0].of([])
            for group in groups
        ]

    def _groups(self, places: Sequence[Place]) -> list[list[Place]] | None:
        """All places, shared out among the parts; None where they are of other files."""
        now = _by_file(places)
        then = _by_file([place for part in self.parts for place in part])
        if now.keys() != then.keys():
            return None
        groups = [
            [place for place in part if then[place[0]] == now[place[0]]] for part in self.parts
        ]
        homes: dict[int, list[int]] = {}
        for number, part in enumerate(self.parts):
            for file in dict.fromkeys(place[0] for place in part):
                homes.setdefault(file, []).append(number)
        for file in now:
            if now[file] != then[file]:
                shares = divided(now[file], len(homes[file]))
                for number, share in zip(homes[file], shares, strict=False):
                    groups[number] += share
        return groups


def _by_file(places: Sequence[Place]) -> dict[int, list[Place]]:
    found: dict[int, list[Place]] = {}
    for place in places:
        found.setdefault(place[0], []).append(place)
    return found
