"""Turn text into tokenized, shuffled, packed shards for training.

examples:
  FineWeb-Edu sample-10BT, from the hub:
    python data_prep/shard.py
  text that every machine has:
    python data_prep/shard.py --source stdlib --vocab-size 4096 --out data/lib
  your own:
    python data_prep/shard.py --source 'texts/*.parquet' --out data/texts
  all of one source, and 30% of the documents of another:
    python data_prep/shard.py --source a.jsonl --source web:0.3 --out data/mix
  a choice of rows:
    python data_prep/shard.py --source 'texts/*.parquet' --out data/chosen \\
      --where "int_score >= 3 and language = 'en'" --deduplicate
  conversations, of which the model learns the answers:
    python data_prep/shard.py --source chats.jsonl --format chat \\
      --out data/chats
  your own with two machines that share a disk, each command on any of them:
    python data_prep/shard.py --source texts --out data/texts --begin
    python data_prep/shard.py --source texts --out data/texts --task 1/2
    python data_prep/shard.py --source texts --out data/texts --task 2/2
    python data_prep/shard.py --source texts --out data/texts --merge --task 1/2
    python data_prep/shard.py --source texts --out data/texts --merge --task 2/2
    python data_prep/shard.py --source texts --out data/texts --merge

A document is a row of parquet, a line of jsonl or ndjson (an object), or a txt
file. Rows and lines have a `text` (or another --text-column), and optionally
an `id` and a `url`. With --format chat a document is a line with `messages`, a
list of {"role": ROLE, "content": TEXT}, where ROLE is system, user or
assistant. Text is UTF-8 unless its byte-order mark says otherwise. A folder is
read with all its subfolders, as by `find -L`, except for hidden names, folders
whose names begin with _ , and the output of this tool. Skipped documents and
left-out files are counted by reason at the end. A broken file ends the run; a
task does all else first. Once it is repaired, its own parts are tokenized
again, and no others. --where, --min-tokens and --max-tokens choose from
--source only: that of --valid is taken as it is.

With several sources documents of all are shuffled together. Each is taken as
often as the source's weight says; copies get places of their own.

The output holds train/ and valid/, each with shard-000000.tar ...,
index.parquet (where every document lies) and manifest.json, beside
tokenizer.json. The same source and settings give the same shards for any
number of --workers and tasks. What was stopped continues when it is started again.
Until packing has ended it may continue with another --chunk-length,
--chunks-per-shard or --valid-fraction. A folder made with other settings, or
from other content, is refused: source.json keeps sizes, times and hashes of
the files that were read. The tool needs disk space for almost twice the shards
while it works; --dry-run says how much, about.
"""

import argparse
import errno
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from data_prep.arguments import ALONE
from data_prep.beginning import Beginning
from data_prep.given_tokenizer import changed_text, given_tokenizer
from data_prep.options import add_options, check_choices
from data_prep.output import Output
from data_prep.output_settings import OutputSettings, layout
from data_prep.preparation import Preparation
from data_prep.reading.hub import DATASET
from data_prep.reading.opening import open_sources, typed_place, typed_source
from data_prep.reading.validation import PairOfSources
from data_prep.sources import Source, clean_file_name
from data_prep.store import Store
from data_prep.tokenizer import DEFAULT_SAMPLE_MB, DEFAULT_VOCABULARY, check_vocabulary
from i3dist.cli.extend import add_extend_option
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool.

    Raises:
        UserError: whatever a user can get wrong.
    """
    options = parse(arguments)
    output = output_of(options)
    given = None
    if options.tokenizer:
        given, added = given_tokenizer(options.tokenizer)
        check_vocabulary(given, options.vocab_size)
        if added:
            print(clean_file_name(f"added to {given.path}: {' '.join(added)}"))
        if changed := changed_text(given):
            before, after = map(ascii, changed)
            print(clean_file_name(f"{given.path} changes text: {before} becomes {after}"))
    former = output.settings()
    source = open_sources(options, former)
    settings = settings_of(options, source, given, former)
    beginning = Beginning(settings, output, source, given, Console(), options.task or ALONE)
    if options.dry_run:
        beginning.foresee(options.workers, options.task.of if options.task else 1)
        return
    preparation = Preparation(beginning, options.workers)
    shared = options.task is not None
    try:
        with output.locked(shared):
            if preparation.is_complete(shared):
                return
            with output.locked_work(shared):
                if not preparation.is_complete(shared):  # by a run on another host
                    step_of(options, preparation)()
    except OSError as error:
        place = error.filename or output.folder
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free some, and run the same command again: it continues" if is_full else ""
        raise UserError(f"cannot write to {place}: {error.strerror or error}{remedy}") from None


def output_of(options: argparse.Namespace) -> Output:
    """The output: a folder, or one of the disk whose content goes to a URL."""
    if isinstance(options.out, Path):
        return Output(options.out)
    store = Store(options.out)
    store.check()
    # The same for every run with this URL, so that one that was stopped continues.
    name = f"i3dist-{hashlib.sha256(options.out.encode()).hexdigest()[:16]}"
    return Output((options.scratch or Path(tempfile.gettempdir())) / name, store)


def step_of(options: argparse.Namespace, preparation: Preparation) -> Callable[[], None]:
    """The step that was asked for."""
    if options.begin:
        return preparation.begin
    if options.task:
        return partial(preparation.pack if options.merge else preparation.tokenize, options.task)
    return preparation.merge if options.merge else preparation.run


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a value that makes no sense is a `UserError`."""
    description, _, more = __doc__.partition("\n\n")
    parser = ArgumentParser(prog="shard.py", description=description, epilog=more)
    add_options(parser)
    add_extend_option(parser)
    options = parser.parse_args(arguments)
    check_choices(options)
    # After all options, as --extend adds names.
    options.source = [typed_source(text) for text in options.source or [DATASET]]
    if options.valid:
        options.valid = typed_place(options.valid)
    return options


def settings_of(
    options: argparse.Namespace,
    source: Source,
    given: Tokenizer | None,
    former: OutputSettings | None,
) -> OutputSettings:
    """What decides the bytes of the output: all options but --out and --workers.

    The source is described as it is in the `former` settings, so that they can be compared. The
    tokenizer's sample is the former one, so that work begun by an older version continues.
    """
    vocab_size = given.vocab_size if given else options.vocab_size or DEFAULT_VOCABULARY
    former_chunks = former.chunks_per_shard if former else None
    sample_mb = former.tokenizer_sample_mb if former else DEFAULT_SAMPLE_MB
    validation = source.validation if isinstance(source, PairOfSources) else None
    return OutputSettings(
        layout=layout(options.deduplicate),
        source=source.name,
        revision=source.revision if former and former.has_content_digest else source.outline,
        tokenizer=f"sha256 {given.sha256}" if given else "trained",
        tokenizer_sample_mb=0 if given else options.tokenizer_sample_mb or sample_mb,
        tokenizer_sample=former.tokenizer_sample if former else "even",
        vocab_size=vocab_size,
        chunk_length=options.chunk_length,
        chunks_per_shard=options.chunks_per_shard or former_chunks,
        valid_fraction=options.valid_fraction,
        seed=options.seed,
        format=options.format,
        where=options.where,
        min_tokens=options.min_tokens,
        max_tokens=options.max_tokens,
        deduplicate=options.deduplicate or None,
        valid=validation.name if validation else None,
        valid_revision=validation.outline if validation else None,
        license=options.license or (former.license if former else source.license),
        valid_license=_valid_license(validation, former),
    )


def _valid_license(validation: Source | None, former: OutputSettings | None) -> str | None:
    if not validation:
        return None
    return former.valid_license if former else validation.license


if __name__ == "__main__":
    with one_line_errors():
        main()
