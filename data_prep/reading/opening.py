"""Opens the sources that the command line of shard.py names."""

import argparse
from pathlib import Path

from data_prep.formats import FORMATS
from data_prep.output_settings import OutputSettings
from data_prep.reading.files import file_source
from data_prep.reading.hub import source_at
from data_prep.reading.mixture import Weighted, mixed, split_weight
from data_prep.reading.validation import PairOfSources
from data_prep.sources import SOURCES, TEXT, Source
from i3dist.cli.paths import is_url, typed_path
from i3dist.errors import UserError


def typed_source(text: str) -> tuple[str | Path, float]:
    """A name, URL or path, and the weight of the source."""
    spec, weight = split_weight(text)
    return typed_place(spec), weight


def typed_place(text: str) -> str | Path:
    """A name or URL as it is, or a path."""
    return text if text in SOURCES or is_url(text) else typed_path(text)


def open_sources(options: argparse.Namespace, former: OutputSettings | None) -> Source:
    """All sources as one; where the output was begun, at the revision of then.

    Raises:
        UserError: a source cannot be opened, or an option does not fit it.
    """
    columns = options.text_column or [None]
    if len(columns) not in (1, len(options.source)):
        raise UserError(
            f"there are {len(columns)} --text-column and {len(options.source)} --source: give the "
            "column once, or once for each source"
        )
    each = columns * (len(options.source) // len(columns))
    pairs = zip(options.source, each, strict=True)
    source = mixed(
        [
            Weighted(open_source(spec, options.format, column), weight)
            for (spec, weight), column in pairs
        ]
    )
    if former and former.source == source.name:
        source.pin(former.revision)
    if options.where:
        source = source.chosen(options.where)
    if not options.valid:
        return source
    column = columns[0] if len(columns) == 1 else None
    validation = open_source(options.valid, options.format, column)
    if former and former.valid == validation.name and former.valid_revision:
        validation.pin(former.valid_revision)
    return PairOfSources(source, validation)


def open_source(spec: str | Path, documents: str = TEXT, column: str | None = None) -> Source:
    """The source of this name, URL or path.

    Args:
        spec: as typed.
        documents: their format.
        column: what holds them, if not the format's own key.

    Raises:
        UserError: there is no such source, its documents are of another format, or it has no
            columns.
    """
    if isinstance(spec, Path):
        source: Source = file_source(spec, documents)
    else:
        source = SOURCES[spec]() if spec in SOURCES else source_at(spec)
    if source.format != documents:
        raise UserError(
            f"--source {spec} has documents of format {source.format}: name it with --format "
            f"{source.format}, or name jsonl files of conversations for --format chat"
        )
    return (
        source.with_text_column(column) if column not in (None, FORMATS[documents].key) else source
    )
