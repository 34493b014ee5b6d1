"""Evaluate a trained model on held-out data: `launch/evaluate.py --checkpoint RUN --data DIR`.

Prints loss, perplexity and bits per byte on the whole valid split of DIR, and the loss by chunk
index within the document: with history, without it, and with another document's.
"""

import argparse
import json

from rich.console import Console
from rich.table import Table

from i3dist.checkpoint.weights import add_model_arguments, load_run
from i3dist.cli import streams
from i3dist.cli.paths import typed_path, typed_place
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.data.corpus import Corpus
from i3dist.data.shards import check_shards
from i3dist.distributed import devices
from i3dist.inference.evaluate import Evaluation, evaluate
from i3dist.tracking.report import progress_bar

ROWS = 8  # windows computed at once
ROWS_SHOWN = 12


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        type=typed_place,
        required=True,
        metavar="DIR",
        help="shard.py's output, or its URL (see data.path in train.py --help)",
    )
    parser.add_argument(
        "--json", type=typed_path, metavar="FILE", help="write the results here too"
    )
    return parser.parse_args()


def print_tables(result: Evaluation) -> None:
    """Print the results."""
    console = Console(width=100)
    console.print(
        f"loss {result.loss:.4f} nats/token   perplexity {result.perplexity:.2f}   "
        f"bits/byte {result.bits_per_byte:.4f}   tokens {result.tokens:,}"
    )
    table = Table(title="loss by chunk index within the document", title_justify="left")
    for heading in ("chunk", "tokens", "loss", "without history", "another document's", "gain"):
        table.add_column(heading, justify="right")
    for chunk in result.by_chunk[:ROWS_SHOWN]:
        gain, other = chunk.loss_without_history - chunk.loss, chunk.loss_other_history
        table.add_row(
            str(chunk.index),
            f"{chunk.tokens:,}",
            f"{chunk.loss:.4f}",
            f"{chunk.loss_without_history:.4f}",
            "" if other is None else f"{other:.4f}",
            f"{gain:+.4f}",
        )
    console.print(table)
    if len(result.by_chunk) > ROWS_SHOWN:
        console.print(f"({len(result.by_chunk) - ROWS_SHOWN} later chunks: see --json)")


def main() -> None:
    """Evaluate and print."""
    arguments = parse_arguments()
    if arguments.json:
        arguments.json.touch()  # fails now rather than after the evaluation
    else:
        streams.require_output()
    model, settings, tokenizer = load_run(
        arguments.checkpoint, devices.pick_device(arguments.device)
    )
    corpus = Corpus.open(arguments.data, settings.model, tokenizer, settings.data)
    check_shards(corpus.valid.folder, corpus.valid.manifest)
    result = evaluate(
        model,
        corpus.valid.held_out(settings.model.history_chunks),
        corpus.tokenizer.token_bytes(),
        ROWS,
        settings.train.window_chunks,
        progress=progress_bar,
    )
    if arguments.json:  # first: printing fails where the reader of the output has gone
        arguments.json.write_text(json.dumps(result.to_dict(), indent=1), encoding="utf-8")
    print_tables(result)


def start() -> None:
    """Run the program."""
    with one_line_errors(output_is_result=True):
        main()


if __name__ == "__main__":
    start()
