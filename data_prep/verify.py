"""Check that an output of shard.py is whole and is what docs/data-format.md says.

examples:
  python data_prep/verify.py data/fineweb-edu
  python data_prep/verify.py data/mine --workers 4 --most 10
  python data_prep/verify.py s3://BUCKET/data

Every shard is read once: its size, its SHA-256, the bytes of the archive, the
range of its ids, <BOS>, <EOS> and <PAD> along the whole stream, the chat tokens
and the mask of conversations, and the pieces that index.parquet says it holds.
The index is read once: its columns, document and piece numbers, ids and URLs.
Manifests, tokenizer.json and shard.json have to agree with each other and with
the totals, and no file may be missing or foreign.

A sound folder gives one line and status 0. Otherwise each damage is one line on
standard output: the file, the place in it, the problem, what to do. Status 1
then. Places count from 0. Not checked: that documents were shuffled, that equal
texts are in one split, and that texts are those of the source.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from data_prep.arguments import CORES, number_in
from data_prep.checks.folder_check import mirror
from data_prep.checks.verification import Advance, Verification
from data_prep.store import Store
from i3dist.cli.paths import typed_place
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.errors import UserError

DEFAULT_MOST = 100


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(prog="verify.py", description=description, epilog=more)
    parser.add_argument(
        "folder", type=typed_place, metavar="DIR", help="an output of shard.py, also at a URL"
    )
    parser.add_argument(
        "--workers",
        type=number_in(int, 1, 1024),
        default=CORES,
        metavar="N",
        help="most processes; a small folder of the disk gets fewer (default: one per core)",
    )
    parser.add_argument(
        "--most",
        type=number_in(int, 1, 1_000_000_000),
        default=DEFAULT_MOST,
        metavar="N",
        help=f"list so many damages, and count the others (default: {DEFAULT_MOST})",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check a folder.

    Raises:
        UserError: it is damaged, or not an output of shard.py.
    """
    options = parse(arguments)
    if isinstance(options.folder, Path):
        _verify(options, options.folder, Verification(options.folder, options.workers))
        return
    store = Store(options.folder)
    with tempfile.TemporaryDirectory() as folder:
        mirror(store, Path(folder))
        _verify(options, store, Verification(Path(folder), options.workers, store))


def _verify(options: argparse.Namespace, place: Path | Store, verification: Verification) -> None:
    start = time.monotonic()
    count, files = 0, set()
    with _bar(verification.bytes) as advance:
        for damage in verification.damages(advance):
            count += 1
            files.add(damage.file)
            if count <= options.most:
                print(damage, flush=True)
    if count > options.most:
        print(f"... and {count - options.most:,} more")
    if count:
        damages = "1 damage" if count == 1 else f"{count:,} damages"
        where = "1 file" if len(files) == 1 else f"{len(files):,} files"
        raise UserError(f"{place} is not sound: {damages} in {where}")
    print(f"{place}: sound; {_totals(verification, time.monotonic() - start)}")
    if verification.unprotected:
        indexes = " and ".join(verification.unprotected)
        print(f"note: {indexes} without page checksums: changed ids and URLs cannot be noticed")


def _totals(verification: Verification, seconds: float) -> str:
    splits = [
        f"{split} {t.documents:,} documents, {verification.check.manifests[split].tokens:,} tokens,"
        f" {t.chunks:,} chunks, {t.shards:,} shards"
        for split, t in verification.totals.items()
    ]
    size = verification.bytes / 1e6
    return f"{'; '.join(splits)}; {size:,.1f} MB in {seconds:,.1f} s"


@contextmanager
def _bar(total: int) -> Iterator[Advance]:
    """Show a bar over so many bytes on standard error, if that is a terminal."""
    columns = (
        TextColumn("verify"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as p:
        task = p.add_task("verify", total=total)
        yield lambda more: p.advance(task, more)


if __name__ == "__main__":
    with one_line_errors(output_is_result=True):
        main()
