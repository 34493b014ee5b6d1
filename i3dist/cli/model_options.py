"""The options of programs that load a model. They are read before torch is imported."""

import argparse

from i3dist.cli.extend import add_extend_option
from i3dist.cli.paths import typed_path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options `--checkpoint`, `--device` and `--extend`."""
    add_extend_option(parser)
    parser.add_argument(
        "--checkpoint",
        type=typed_path,
        required=True,
        metavar="RUN",
        help="folder of a run that has ended, or a checkpoint: RUN/checkpoints (the newest in it), "
        "RUN/checkpoints/step-00000100, or a copy of one; or an exported model's folder",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what it runs on; auto is CUDA where there is a GPU",
    )
