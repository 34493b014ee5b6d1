"""Makes long documents: joins the pieces of each book in their order.

    python benchmarks/books.py SOURCE... OUT.parquet

It reads parquet files with columns `text` and `url`, where the url of a piece is BOOK#CHAPTER or
BOOK#CHAPTER.PIECE, and writes one row for each book, longest first.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from i3dist.cli.paths import result_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.errors import UserError
from i3dist.files import write_result


def place(url: str) -> tuple[str, tuple[int, ...]]:
    """A piece's book, and its place in the book."""
    book, _, numbers = url.rpartition("#")
    try:
        return book, tuple(int(number) for number in numbers.split("."))
    except ValueError:
        raise UserError(f"url {url!r} is not BOOK#CHAPTER or BOOK#CHAPTER.PIECE") from None


def join(paths: list[Path]) -> dict[str, str]:
    """Book -> its text."""
    pieces: dict[str, dict[tuple[int, ...], str]] = defaultdict(dict)
    for path in paths:
        table = pq.read_table(path, columns=["text", "url"])
        for text, url in zip(*(table[name].to_pylist() for name in ("text", "url")), strict=True):
            book, where = place(url)
            pieces[book][where] = text
    texts = {
        book: "\n\n".join(text for _, text in sorted(of.items())) for book, of in pieces.items()
    }
    return dict(sorted(texts.items(), key=lambda item: (-len(item[1]), item[0])))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="+", type=Path, help="parquet files of pieces")
    parser.add_argument("out", type=result_path, help="parquet file of books")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Join and write."""
    options = parse_arguments(arguments)
    for path in options.source:
        if not path.is_file():
            raise UserError(f"there is no file {path}")
    books = join(options.source)
    rows = {"text": list(books.values()), "id": list(books), "url": list(books)}
    file = pa.BufferOutputStream()
    pq.write_table(pa.table(rows), file, compression="zstd", row_group_size=64)
    write_result(options.out, file.getvalue().to_pybytes())
    total = sum(map(len, books.values()))
    print(f"{len(books):,} books, {total:,} characters, {total // max(1, len(books)):,} on average")


if __name__ == "__main__":
    with one_line_errors():
        main()
