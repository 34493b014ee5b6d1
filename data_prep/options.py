"""The command line of shard.py."""

import argparse
from pathlib import Path

from data_prep.arguments import CORES, TaskShare, number_in
from data_prep.formats import FORMATS
from data_prep.given_tokenizer import typed_tokenizer
from data_prep.pack import MOST_CHUNKS, SHARDS_WANTED
from data_prep.reading.hub import CONFIGS, DATASET, HUB_NAME
from data_prep.reading.readers import SUFFIXES_IN_WORDS
from data_prep.sources import CHAT, TEXT
from data_prep.tokenizer import (
    DEFAULT_SAMPLE_MB,
    DEFAULT_VOCABULARY,
    SMALLEST_VOCABULARY,
)
from i3dist.cli.paths import literal_name, typed_path, typed_place
from i3dist.cli.program import ArgumentParser
from i3dist.data.token_types import LARGEST_VOCABULARY
from i3dist.errors import UserError

MOST_TOKENS = 1 << 40
VALID_FRACTION = 0.005

# name, kind, least, most, default, help
NUMBERS = (
    ("vocab-size", int, SMALLEST_VOCABULARY, LARGEST_VOCABULARY, None, "entries of the vocabulary"),
    ("tokenizer-sample-mb", int, 1, 10_000, None, "train the tokenizer on N MB of the text"),
    ("workers", int, 1, 1024, CORES, "processes that tokenize"),
    ("chunk-length", int, 2, 1 << 16, 512, "tokens per chunk"),
    ("chunks-per-shard", int, 1, 1_000_000, None, "fewer make more shards, for larger batches"),
    ("valid-fraction", float, 0.0, 0.9, None, "share of documents for validation; 0: no split"),
    ("seed", int, 0, (1 << 63) - 1, 0, "of the shuffle and the split"),
)
BOUNDS = (
    ("min-tokens", int, 1, MOST_TOKENS, None, "skip documents of fewer tokens"),
    ("max-tokens", int, 1, MOST_TOKENS, None, "skip documents of more tokens"),
)


def add_options(parser: ArgumentParser) -> None:
    """Add all options."""
    parser.add_argument(
        "--source",
        action="append",
        type=_source,
        metavar="SOURCE",
        help=f"a file, a folder or a glob of {SUFFIXES_IN_WORDS}; the same at any URL that fsspec "
        "opens (s3, gs, http, ...); hf://datasets/OWNER/NAME/CONFIG; "
        f"{DATASET}/CONFIG, where CONFIG is {', '.join(CONFIGS)}; `stdlib`, the text of this "
        "Python's standard library; or a name that --extend adds. Repeatable: SOURCE:0.3 takes "
        "30%% of its documents, SOURCE:2.5 all twice and half of them once more (default: "
        f"{HUB_NAME}, streamed from the hub)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=TEXT,
        help="what documents are: text, or chat: conversations, of which answers alone are learned "
        "(default: text)",
    )
    parser.add_argument(
        "--text-column",
        action="append",
        type=_column,
        metavar="NAME",
        help="the column of parquet, or the key of jsonl, that holds the document; given once, or "
        f"once for each --source (default: {FORMATS[TEXT].key}; with --format chat "
        f"{FORMATS[CHAT].key})",
    )
    out = Path("data/fineweb-edu")
    parser.add_argument(
        "--out",
        type=typed_place,
        default=out,
        help="folder, or the URL of one that fsspec can write to (s3, gs, ...): shards are made on "
        f"the disk, and moved there (default: {out})",
    )
    parser.add_argument(
        "--scratch",
        type=typed_path,
        metavar="DIR",
        help="where shards are made for an --out at a URL; --dry-run says how much disk they take "
        "(default: the system's folder for temporary files)",
    )
    parser.add_argument(
        "--tokenizer",
        type=typed_tokenizer,
        help="a tokenizer.json of byte-level BPE, or OWNER/NAME of one on the hub; special tokens "
        "that it lacks are added (default: train it)",
    )
    _add_steps(parser)
    unset = {
        "vocab-size": f"--tokenizer's, else {DEFAULT_VOCABULARY}",
        "tokenizer-sample-mb": DEFAULT_SAMPLE_MB,
        "workers": "one per core",
        "chunks-per-shard": f"up to {MOST_CHUNKS:,}, for {SHARDS_WANTED} shards or more",
        "valid-fraction": VALID_FRACTION,
    }
    for name, kind, least, most, default, text in NUMBERS:
        parser.add_argument(
            f"--{name}",
            type=number_in(kind, least, most),
            default=default,
            metavar="N",
            help=f"{text} (default: {unset.get(name, default)})",
        )

    _add_choices(parser)


def _add_choices(parser: ArgumentParser) -> None:
    """Add the options that choose documents, and record where they come from."""
    group = parser.add_argument_group("choosing documents (by default all are kept)")
    group.add_argument(
        "--where",
        type=_condition,
        metavar="CONDITION",
        help="keep only rows of parquet or jsonl for which this is true, in the SQL of DuckDB; for "
        "example \"int_score >= 3 and language = 'en'\"",
    )
    for name, kind, least, most, default, text in BOUNDS:
        number = number_in(kind, least, most)
        group.add_argument(f"--{name}", type=number, default=default, metavar="N", help=text)
    group.add_argument(
        "--deduplicate",
        action="store_true",
        help="of documents that are equal but for white space, upper and lower case and the form "
        "of Unicode, keep the first by source and position",
    )
    group.add_argument(
        "--valid",
        type=_source,
        metavar="SOURCE",
        help="what to validate on, named as with --source; all of --source is for training then",
    )
    group.add_argument(
        "--license", metavar="NAME", help="license of --source, to be recorded in shard.json"
    )


def check_choices(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and complete --valid-fraction.

    Raises:
        UserError: they do.
    """
    if options.begin and options.task:
        raise UserError("--begin is one step for all tasks: omit --task")
    least, most = options.min_tokens, options.max_tokens
    if least is not None and most is not None and least > most:
        raise UserError(f"--min-tokens {least} is more than --max-tokens {most}: lower it")
    if options.scratch and isinstance(options.out, Path):
        raise UserError("--scratch is for an --out at a URL: omit it")
    is_shared = options.begin or options.merge or (options.task and not options.dry_run)
    if is_shared and not isinstance(options.out, Path) and not options.scratch:
        raise UserError(
            "tasks of an --out at a URL work in one folder: name it with --scratch DIR, on storage "
            "that all machines see"
        )
    if options.valid and options.valid_fraction is not None:
        raise UserError("--valid and --valid-fraction exclude each other: omit one")
    if options.valid_fraction is None:
        options.valid_fraction = 0.0 if options.valid else VALID_FRACTION


def _condition(text: str) -> str:
    if not text.strip():  # an unset variable of a script, and all documents would be kept
        raise argparse.ArgumentTypeError("it is empty: omit it to keep all documents")
    return text


def _column(text: str) -> str:
    try:
        return literal_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _add_steps(parser: ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="show about what would be made, the disk and the time that it takes, and stop; with "
        "--task 1/N the time on N machines like this one",
    )
    group.add_argument(
        "--begin",
        action="store_true",
        help="show what --dry-run shows (for 64 MB or more), make the tokenizer, and stop",
    )
    group.add_argument(
        "--merge",
        action="store_true",
        help="pack what tasks have tokenized and not packed, and finish",
    )
    parser.add_argument(
        "--task",
        type=TaskShare.parse,
        metavar="I/N",
        help="do one of N shares, I = 1 to N, beside other tasks, and stop: of tokenizing, or with "
        "--merge of packing, when all is tokenized",
    )


def _source(text: str) -> str:
    """A source as typed, with its weight. What it names depends on the registered names."""
    typed_place(text)
    return text
