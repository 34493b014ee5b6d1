"""Evaluate a model on held-out data: `python launch/evaluate.py --checkpoint RUN --data DIR`.

Prints loss, perplexity and bits per byte on the whole valid split of DIR. By chunk index within the
document it prints bits per byte, and the loss with history, without it, and with that of another
document. With --tasks instead of --data it runs tasks of lm-evaluation-harness, and prints its
table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from i3dist.checkpoint.weights import load_run
from i3dist.cli import streams
from i3dist.cli.model_options import add_model_arguments
from i3dist.cli.paths import result_path, typed_path, typed_place
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.data.corpus import Corpus
from i3dist.data.shards import check_shards
from i3dist.distributed import devices
from i3dist.errors import UserError
from i3dist.export.harness import run_tasks, table_of
from i3dist.files import printing_beside, write_result
from i3dist.inference.evaluate import Evaluation, evaluate
from i3dist.tracking.report import progress_bar

ROWS = 8  # windows computed at once
ROWS_SHOWN = 12


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data",
        type=typed_place,
        metavar="DIR",
        help="shard.py's output, or its URL (see data.path in train.py --help)",
    )
    what.add_argument(
        "--tasks",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help="tasks of lm-evaluation-harness (pip install 'i3dist[eval]')",
    )
    parser.add_argument(
        "--json", type=result_path, metavar="FILE", help="write the results here too"
    )
    tasks = parser.add_argument_group("options of --tasks")
    tasks.add_argument(
        "--task-folder", type=typed_path, metavar="DIR", help="tasks of your own, as YAML files"
    )
    tasks.add_argument(
        "--limit", type=int, metavar="N", help="examples of each task (default: all)"
    )
    tasks.add_argument("--batch-size", type=int, metavar="N", help="rows at once (default: 1)")
    return parser.parse_args()


def print_tables(result: Evaluation) -> None:
    """Print the results."""
    console = Console(width=100)
    console.print(
        f"loss {result.loss:.4f} nats/token   perplexity {result.perplexity:.2f}   "
        f"bits/byte {result.bits_per_byte:.4f}   tokens {result.tokens:,}"
    )
    table = Table(title="loss by chunk index within the document", title_justify="left")
    losses = ("loss", "without history", "another's", "gain", "bits/byte")
    for heading in ("chunk", "tokens", *losses):
        table.add_column(heading, justify="right")
    for chunk in result.by_chunk[:ROWS_SHOWN]:
        gain, other = chunk.loss_without_history - chunk.loss, chunk.loss_other_history
        bits = chunk.bits_per_byte
        table.add_row(
            str(chunk.index),
            f"{chunk.tokens:,}",
            f"{chunk.loss:.4f}",
            f"{chunk.loss_without_history:.4f}",
            "" if other is None else f"{other:.4f}",
            f"{gain:+.4f}",
            "" if bits is None else f"{bits:.4f}",
        )
    console.print(table)
    if len(result.by_chunk) > ROWS_SHOWN:
        console.print(f"({len(result.by_chunk) - ROWS_SHOWN} later chunks: see --json)")


def evaluate_data(arguments: argparse.Namespace, device: torch.device) -> Evaluation:
    """Evaluate on held-out data."""
    model, settings, tokenizer = load_run(arguments.checkpoint, device)
    corpus = Corpus.open(arguments.data, settings.model, tokenizer, settings.data)
    check_shards(corpus.valid.folder, corpus.valid.manifest)
    return evaluate(
        model,
        corpus.valid.held_out(settings.model.history_chunks),
        corpus.tokenizer.token_bytes(),
        ROWS,
        settings.train.window_chunks,
        progress=progress_bar,
    )


def check_options(arguments: argparse.Namespace) -> None:
    """Check --limit, --batch-size, and what is given without --tasks.

    Raises:
        UserError: a number is not 1 or more, or an option needs --tasks.
    """
    for option, number in (("limit", arguments.limit), ("batch-size", arguments.batch_size)):
        if number is not None and number < 1:
            raise UserError(f"--{option} {number} must be 1 or more")
    for option in ("task_folder", "limit", "batch_size"):
        if arguments.tasks is None and getattr(arguments, option) is not None:
            name = option.replace("_", "-")
            raise UserError(f"--{name} is an option of --tasks: leave it out with --data")


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Write results to the file of --json, if there is one."""
    if file is not None:
        write_result(file, json.dumps(content, indent=1).encode())


def main() -> None:
    """Evaluate, write and print."""
    arguments = parse_arguments()
    check_options(arguments)
    if not arguments.json:
        streams.require_output()
    device = devices.pick_device(arguments.device)
    # The file is written first: printing fails where the reader of the output has gone.
    if arguments.tasks is None:
        result = evaluate_data(arguments, device)
        write_json(arguments.json, result.to_dict())
        with printing_beside(arguments.json):
            print_tables(result)
    else:
        found = run_tasks(
            arguments.checkpoint,
            arguments.tasks,
            device,
            batch_size=arguments.batch_size or 1,
            limit=arguments.limit,
            folder=arguments.task_folder,
        )
        write_json(arguments.json, found["results"])
        with printing_beside(arguments.json):
            print(table_of(found))


def start() -> None:
    """Run the program."""
    with one_line_errors(output_is_result=True):
        main()


if __name__ == "__main__":
    start()
