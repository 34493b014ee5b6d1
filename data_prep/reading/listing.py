"""Lists the files of a folder or a glob, and counts what is left out.

A folder is walked as by `find -L`. Left out are names that begin with a dot or `~$`, folders whose
names begin with `_`, and the output of this tool. A glob finds what Python's `glob` finds. A link
is not followed back to a folder that it lies in.
"""

import fnmatch
import glob
import itertools
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn

from data_prep.output import is_output
from data_prep.reading.readers import SUFFIXES
from data_prep.sources import NamedFile
from i3dist.errors import UserError, printable

_HIDDEN = (".", "~$")
_ENDINGS_NAMED = 6


class Listing:
    """The files of a source below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: Counter[str] = Counter()
        """Number of files and folders that were left out, by reason."""
        self._endings: Counter[str] = Counter()
        self._files: set[Path] = set()
        self._is_ours = _recogniser(root)

    def add_folder(self) -> None:
        """Add all files below the root."""
        for _, files in walk(self.root, self._enters):
            for path in files:
                if not path.name.startswith(_HIDDEN):
                    self._add(path)
                elif _is_source(path):
                    self.left_out["hidden files"] += 1

    def add_matches(self, parts: Sequence[str]) -> None:
        """Add the files below the root that match a glob, given component by component."""
        for path in set(self._matches(self.root, parts)):
            if not os.path.isdir(path):
                self._add(path)
            elif "**" not in parts:
                self.left_out["folders"] += 1

    def files(self) -> tuple[NamedFile, ...]:
        """The files, in the order of their names."""
        return named(self._files, self.root)

    def report(self) -> str:
        """What was left out, in words; empty if nothing was."""
        counts = [f"{reason} ({count:,})" for reason, count in sorted(self.left_out.items())]
        if self._endings:
            names = [name for name, _ in self._endings.most_common(_ENDINGS_NAMED + 1)]
            names[_ENDINGS_NAMED:] = ["..."] * (len(names) > _ENDINGS_NAMED)
            counts.append(f"files that end in {', '.join(names)} ({self._endings.total():,})")
        return printable(", ".join(counts))

    def _add(self, path: Path) -> None:
        if not _is_source(path):
            if os.path.exists(path):
                self._endings[path.suffix.lower() or "something else"] += 1
            else:
                self.left_out["links to nothing"] += 1
        elif self._is_ours(path.parent) or (path.is_symlink() and self._is_ours(path)):
            self.left_out["files that this tool has made"] += 1
        elif stat.S_ISREG(_mode(path)):
            self._files.add(path)
        else:
            self.left_out["pipes, sockets or devices"] += 1

    def _matches(self, folder: Path, parts: Sequence[str]) -> Iterator[Path]:
        """As `glob`, but without circles of links, and an unreadable folder is an error."""
        if not parts:
            yield folder
        elif not os.path.isdir(folder):
            return
        elif parts[0] == "**":
            for below, _ in walk(folder, lambda path: not path.name.startswith(".")):
                yield from self._matches(below, parts[1:] or ["*"])
        elif glob.has_magic(parts[0]):
            _, folders, files = next(os.walk(folder, onerror=_refuse))
            for name in fnmatch.filter((*folders, *files), parts[0]):
                if parts[0].startswith(".") or not name.startswith("."):
                    yield from self._matches(folder / name, parts[1:])
        elif os.path.lexists(folder / parts[0]):
            yield from self._matches(folder / parts[0], parts[1:])

    def _enters(self, folder: Path) -> bool:
        if folder.name.startswith(_HIDDEN):
            self.left_out["hidden folders"] += 1
        elif folder.name.startswith("_") and "=" not in folder.name:  # _a=1: a partition
            self.left_out["folders whose names begin with _"] += 1
        elif self._is_ours(folder):
            self.left_out["folders that this tool has made"] += 1
        else:
            return True
        return False


def named(files: Iterable[Path], root: Path) -> tuple[NamedFile, ...]:
    """Files with their names below `root`, in the order of their names."""
    pairs = ((path, path.relative_to(root).as_posix()) for path in files)
    return tuple(sorted(pairs, key=lambda pair: pair[1]))


def walk(root: Path, enters: Callable[[Path], bool]) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder from `root` down, with everything in it that is not a folder.

    Links are followed, but not back to a folder that they lie in. `enters` tells which folders to
    walk into.
    """
    for name, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folder = Path(name)
        above = [path for path in (folder, *folder.parents) if path.is_relative_to(root)]
        inner = ((entry, folder / entry) for entry in folders)
        folders[:] = [e for e, path in inner if enters(path) and not any(map(path.samefile, above))]
        yield folder, [folder / file for file in files]


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"cannot read {error.filename}: {error.strerror}") from None


def _is_source(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        link = f", a link to {os.readlink(path)}" if path.is_symlink() else ""
        reason = f"{error.strerror}; repair or remove it"
        raise UserError(f"cannot read {path}{link}: {reason}") from None


def _recogniser(root: Path) -> Callable[[Path], bool]:
    """A function that tells whether a path below `root`, or its target, lies in our output."""
    top = Path(os.path.realpath(root))
    is_known_output = cache(is_output)

    @cache
    def lies_in_output(path: Path) -> bool:
        real = Path(os.path.realpath(path))
        above = itertools.takewhile(lambda folder: folder != top, (real, *real.parents))
        return any(map(is_known_output, (*above, top)))

    return lies_in_output
