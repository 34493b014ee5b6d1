"""Export a trained model to transformers: `python launch/export.py RUN OUT`.

OUT then holds weights, configuration, tokenizer with chat template, a model card with the run's
figures, and code that needs torch and transformers only:
AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True). OUT appears when it is complete.
"""

import argparse

from i3dist.cli.extend import add_extend_option
from i3dist.cli.paths import typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.export.folder import export


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "run",
        type=typed_path,
        metavar="RUN",
        help="folder of a run that has ended, or a checkpoint: RUN/checkpoints (the newest in it), "
        "RUN/checkpoints/step-00000100, or a copy of one",
    )
    parser.add_argument(
        "out",
        type=typed_path,
        metavar="OUT",
        help="folder to write; it must be empty, or not exist",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at OUT")
    add_extend_option(parser)
    return parser.parse_args()


def main() -> None:
    """Export, and say where to."""
    arguments = parse_arguments()
    export(arguments.run, arguments.out, arguments.overwrite)
    print(f"{arguments.out}: a model for transformers; {arguments.out / 'README.md'} says how")


def start() -> None:
    """Run the program."""
    with one_line_errors():
        main()


if __name__ == "__main__":
    start()
