"""Report what is in an output of shard.py: lengths, history, domains, examples.

examples:
  python data_prep/report.py data/mine
  python data_prep/report.py data/mine --html mine.html
  python data_prep/report.py data/mine --split valid

The figures: documents and tokens; the epochs of each of several sources; what
filters removed, by source and reason, if shard.py was told to choose documents;
the lengths of documents; the chunks that a document lies in; the share of
tokens that have 0 to 8 chunks of history before them, which is what a model
with compressed history can use; bytes per token; the domains with most tokens;
and a few examples, of short, median and long documents. --html writes them to
one page with charts, which needs no other file.

Lengths, chunks, history and domains are read from index.parquet, all of it.
Bytes per token are those of a sample of shards. --seed draws the sample and
the examples. Memory does not grow with the data.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.arguments import number_in
from data_prep.checks.folder_check import SPLITS
from data_prep.output_settings import TRAIN
from data_prep.progress import SOURCE_HEADINGS
from data_prep.reports.figures import TOP_DOMAINS, Figures
from data_prep.reports.lookup import reading_index
from data_prep.reports.page import page
from i3dist.cli.paths import result_path, typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.errors import printable
from i3dist.files import printing_beside, write_result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(prog="report.py", description=description, epilog=more)
    parser.add_argument("folder", type=typed_path, metavar="DIR", help="an output of shard.py")
    parser.add_argument(
        "--split", choices=SPLITS, default=TRAIN, help="what to describe (default: train)"
    )
    parser.add_argument("--html", type=result_path, metavar="FILE", help="write a page too")
    parser.add_argument(
        "--seed",
        type=number_in(int, 0, (1 << 63) - 1),
        default=0,
        metavar="N",
        help="of the sample and the examples (default: 0)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write the page.

    Raises:
        UserError: the folder cannot be read, or the page cannot be written.
    """
    options = parse(arguments)
    with reading_index(options.folder / options.split):
        figures = Figures.of(options.folder, options.split, options.seed)
    with printing_beside(options.html):
        print_tables(figures, Console())
    if options.html is not None:
        write_result(options.html, page(figures).encode())


def print_tables(figures: Figures, console: Console) -> None:
    """Print all figures but the examples."""
    sources = figures.sources()
    source = [("source", figures.reader.manifest.source, "")] if sources is None else []
    console.print(_table("Totals", ("", "", ""), [*source, *figures.totals()]))
    if sources is not None:
        console.print(_table("Sources, all splits together", SOURCE_HEADINGS, sources))
    if (dropped := figures.dropped()) is not None:
        counts = [(source, reason, f"{count:,}") for source, reason, count in dropped]
        console.print(_table("What filters removed", ("source", "reason", "documents"), counts))
        console.print(figures.dropped_in_words())
    console.print(_table("Lengths of documents", ("", "tokens"), figures.lengths()))
    chunks = [(label, f"{count:,}") for label, count in figures.chunks()]
    console.print(_table("Chunks per document", ("chunks", "documents"), chunks))
    shares = [(label, f"{share:.2%}") for label, share in figures.history()]
    console.print(_table("History", ("chunks of history", "tokens"), shares))
    console.print(figures.history_in_words())
    domains = [(name, f"{tokens:,}", f"{share:.2%}") for name, tokens, share in figures.domains()]
    title = f"Domains with most tokens (top {TOP_DOMAINS})"
    console.print(_table(title, ("domain", "tokens", "share"), domains))
    console.print(figures.domains_in_words())


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(headings))
    for number, heading in enumerate(headings):
        is_text = not number or heading == "reason"
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    return table


if __name__ == "__main__":
    with one_line_errors(output_is_result=True):
        main()
