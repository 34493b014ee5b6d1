"""Show text in an output of shard.py: a chunk, a document, or what a run reads.

examples:
  python data_prep/show.py data/mine --shard 3 --chunk 17
  python data_prep/show.py data/mine --document '<urn:uuid:6f1c...>'
  python data_prep/show.py data/mine --document '#41' --run runs/mine
  python data_prep/show.py data/mine --step 1200 --lane 5 --run runs/mine

A chunk is shown with every document in it: number, id, URL, and where it lies.
--step and --lane show the chunks that one lane reads at an optimizer step, from
the run's settings; the run's ledger has to agree. --document shows where a
document lies; with --run also the step and the lane that read each of its
chunks in the first epoch. So a trained token leads to its source, and back.

Steps count from 1, as in the ledger. Shards, chunks, tokens, documents and
lanes count from 0. The number of ranks plays no part: lanes are those of the
whole job. Bytes that are half of a character at a chunk's end show as U+FFFD.
Of conversations the chat tokens show by their names.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from data_prep.arguments import number_in
from data_prep.checks.folder_check import SPLITS
from data_prep.output_settings import TRAIN
from data_prep.reports.lookup import Part, Piece, SplitReader
from data_prep.reports.trained import TrainedRun
from i3dist.cli.paths import typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.data.manifest import shard_name
from i3dist.errors import UserError, printable

LARGEST = 1 << 53
DEFAULT_CHARACTERS = 2000


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(prog="show.py", description=description, epilog=more)
    number = number_in(int, 0, LARGEST)
    parser.add_argument("folder", type=typed_path, metavar="DIR", help="an output of shard.py")
    parser.add_argument(
        "--split", choices=SPLITS, default=TRAIN, help="where to look (default: train)"
    )
    parser.add_argument("--shard", type=number, metavar="S", help="with --chunk: number of a shard")
    parser.add_argument("--chunk", type=number, metavar="C", help="number of a chunk in the shard")
    parser.add_argument("--document", metavar="ID", help="id in the source, or #N: its number")
    parser.add_argument("--step", type=number, metavar="N", help="with --lane, --run: a step")
    parser.add_argument("--lane", type=number, metavar="G", help="a lane of the whole job")
    parser.add_argument("--run", type=typed_path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--characters",
        type=number,
        default=DEFAULT_CHARACTERS,
        metavar="N",
        help="show a longer document's beginning and end, so many characters together; 0: all of "
        f"it (default: {DEFAULT_CHARACTERS:,})",
    )
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Refuse combinations of options that mean nothing."""
    names = ("shard", "chunk", "document", "step", "lane", "run")
    given = {name for name in names if getattr(options, name) is not None}
    wanted = ({"shard", "chunk"}, {"document"}, {"document", "run"}, {"step", "lane", "run"})
    if given not in wanted:
        raise UserError(
            "give --shard and --chunk, or --document (with or without --run), or --step, --lane "
            "and --run (see --help)"
        )
    if options.run is not None and options.split != TRAIN:
        raise UserError("a run trains on the split train: leave --split out, or --run")


def main(arguments: Sequence[str] | None = None) -> None:
    """Show what is asked for.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    options = parse(arguments)
    show = Show(SplitReader(options.folder, options.split))
    run = TrainedRun(options.run, options.folder) if options.run is not None else None
    if options.document is not None:
        for pieces in show.reader.documents(options.document):
            show.document(pieces, run, options.characters)
    elif run is not None:
        show.step(run, options.step, options.lane)
    else:
        show.chunk(options.shard, options.chunk)


class Show:
    """Prints; in color on a terminal, else as plain lines that are never wrapped."""

    def __init__(self, reader: SplitReader) -> None:
        self.reader = reader
        self._console = Console(highlight=False, soft_wrap=True)

    def chunk(self, shard: int, chunk: int) -> None:
        """A chunk, document by document."""
        parts = self.reader.parts(shard, chunk)
        manifest = self.reader.manifest
        place = f"{manifest.split}/{shard_name(shard)}, chunk {chunk}"
        learned = self.reader.learned(shard, chunk)
        of_them = "" if learned is None else f", {learned} of them learned"
        documents = _count(len(parts), "document")
        self._line(f"{place}: {manifest.chunk_length} tokens{of_them}, {documents}")
        for part in parts:
            self._heading(part.piece)
            self._line(_range(part), "dim")
            self._text(part.text)

    def document(self, pieces: Sequence[Piece], run: TrainedRun | None, most: int) -> None:
        """A document: where it lies, when it is read, its text."""
        self._heading(pieces[0])
        tokens = sum(piece.length for piece in pieces)
        self._line(f"{tokens:,} tokens in {_count(len(pieces), 'piece')}", "dim")
        for piece in pieces:
            self._line(
                f"piece {piece.piece}: {self.reader.manifest.split}/{shard_name(piece.shard)}, "
                f"chunk {piece.chunk}, token {piece.offset}, {piece.length:,} tokens",
                "dim",
            )
            if run is not None:
                self._readings(run, piece)
        text = self.reader.text(pieces)
        if most and len(text) > most:
            begin, end = text[: most - most // 2], text[len(text) - most // 2 :]
            self._text(begin)
            self._line(f"... {len(text) - most:,} characters left out ...", "dim")
            self._text(end)
        else:
            self._text(text)

    def step(self, run: TrainedRun, step: int, lane: int) -> None:
        """The chunks that a lane reads at a step."""
        places = run.places(step, lane)
        self._line(f"{run.run}: step {step}, lane {lane}: {run.state_of(step)}", "bold")
        for number, place in enumerate(places):
            self._line("")
            self._line(f"window chunk {number} of {len(places)}", "bold")
            if place is None:
                self._line("the lane idles until the epoch ends")
            else:
                self.chunk(*place)

    def _readings(self, run: TrainedRun, piece: Piece) -> None:
        """A line for each run of chunks of a piece that one step reads."""
        length = self.reader.manifest.chunk_length
        last = piece.chunk + (piece.offset + piece.length - 1) // length
        first = piece.chunk
        for chunk in range(piece.chunk, last + 1):
            step, lane = run.reading(piece.shard, chunk)
            if chunk == last or run.reading(piece.shard, chunk + 1) != (step, lane):
                chunks = f"chunk {chunk}" if chunk == first else f"chunks {first} to {chunk}"
                state = run.state_of(step)
                self._line(f"  {chunks}: epoch 1, step {step}, lane {lane} ({state})", "dim")
                first = chunk + 1

    def _heading(self, piece: Piece) -> None:
        self._line("")
        self._line(f"document {piece.document}  id {printable(piece.id)}", "bold cyan")
        self._line(f"url {printable(piece.url)}", "cyan")

    def _line(self, line: str, style: str = "") -> None:
        self._console.print(Text(line, style))

    def _text(self, text: str) -> None:
        """Text of a document as it is; on a terminal its control characters become "?"."""
        if self._console.is_terminal:
            text = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
        print(text)


def _range(part: Part) -> str:
    here = f"tokens {part.start} to {part.stop - 1} of the chunk"
    after = part.before + part.stop - part.start - 1
    return f"{here}, {part.before:,} to {after:,} of the document (piece {part.piece.piece})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number:,} {what}s"


if __name__ == "__main__":
    with one_line_errors(output_is_result=True):
        main()
