"""Findings about the hosts of a job, and how a line names hosts and ranks."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from i3dist.preflight.facts import Facts

Everyone = Sequence[Facts]  # by rank

NAMED = 4  # hosts, packages or settings that a line names; it counts the others


@dataclass(frozen=True)
class Finding:
    """What is wrong on some hosts."""

    where: str
    what: str
    remedy: str
    refuses: bool = True
    """Whether the job is not to start; else this is a warning."""
    ends_anyway: bool = False
    """Whether the job ends for this reason without a preflight, too."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"


def hosts(some: Everyone) -> list[str]:
    """Their hosts, in the order of ranks."""
    return list(dict.fromkeys(facts.host for facts in some))


def where(some: Everyone, everyone: Everyone) -> str:
    """The hosts of some ranks; with the ranks where others of the same host are not among them."""
    names = hosts(some)
    if len(names) > 1 and len(some) == len(everyone):
        return "every host"
    parts = []
    for name in names:
        ranks = [facts.rank for facts in some if facts.host == name]
        whole = len(ranks) == sum(facts.host == name for facts in everyone)
        numbers = ", ".join(map(str, ranks))
        parts.append(name if whole else f"{name} (rank{'s'[: len(ranks) > 1]} {numbers})")
    return listed(parts)


def listed(parts: Sequence[str]) -> str:
    """The first things; the others are counted."""
    more = [f"{len(parts) - NAMED} more"] if len(parts) > NAMED else []
    return ", ".join([*parts[:NAMED], *more])


def groups(some: Everyone, of: Callable[[Facts], Hashable]) -> list[list[Facts]]:
    """Ranks of equal value together; the largest group first, of equally large ones the earlier."""
    counts = Counter(of(facts) for facts in some)
    return [[f for f in some if of(f) == value] for value, _ in counts.most_common()]


def unlike(
    everyone: Everyone,
    some: Everyone,
    of: Callable[[Facts], Hashable],
    what: Callable[[Facts, Facts], str],
    remedy: str,
    refuses: bool = True,
) -> Iterator[Finding]:
    """A finding for each group of ranks whose value is not the usual one.

    Args:
        everyone: all ranks.
        some: those to compare.
        of: the value.
        what: says what is wrong, of a rank of the group and one with the usual value.
        remedy: what to do.
        refuses: whether the job is not to start.
    """
    usual, *others = groups(some, of) or [[]]
    for group in others:
        yield Finding(where(group, everyone), what(group[0], usual[0]), remedy, refuses)
