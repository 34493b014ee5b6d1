"""What was dropped: how many documents of each source, by reason."""

from collections import Counter
from collections.abc import Mapping, Sequence

from data_prep.output_settings import VALID, OutputSettings
from data_prep.shuffle import PartSummary
from data_prep.sources import Part

BySource = Mapping[str, Mapping[str, int]]
"""Numbers of documents, by the name of the source and the reason."""


def dropped_by_split(
    parts: Sequence[Part], summaries: Sequence[PartSummary], settings: OutputSettings
) -> dict[str, BySource]:
    """What was dropped of the sources of each split; splits of one source have the same."""
    found: dict[str, BySource] = {}
    for split in settings.splits:
        counts: dict[str, Counter[str]] = {}
        for part, summary in zip(parts, summaries, strict=True):
            if part.is_validation in (None, split == VALID):
                name = part.source or settings.source_of(split)
                counts.setdefault(name, Counter()).update(summary.skipped)
        found[split] = {name: dict(sorted(counts[name].items())) for name in sorted(counts)}
    return found


def rows(dropped: BySource) -> list[tuple[str, str, int]]:
    """Rows of a table: source, reason, documents."""
    return [
        (source, reason, count)
        for source, found in dropped.items()
        for reason, count in found.items()
    ]
