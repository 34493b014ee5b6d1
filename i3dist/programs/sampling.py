"""The options of programs that sample text."""

import argparse

from i3dist.errors import UserError
from i3dist.inference.sampling_settings import Sampling


def add_sampling_arguments(parser: argparse.ArgumentParser, tokens: str) -> None:
    """Add the options --tokens, of which `tokens` is the help, --temperature, --top-k, --top-p and
    --seed."""
    default = Sampling()
    parser.add_argument("--tokens", type=int, default=256, help=f"{tokens} (default: 256)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=default.temperature,
        help=f"divides the logits; 0 takes the likeliest token (default: {default.temperature})",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=default.top_k,
        help=f"likeliest tokens to keep; 0 keeps all (default: {default.top_k})",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=default.top_p,
        help=f"probability mass to keep (default: {default.top_p})",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """How tokens are sampled.

    Raises:
        UserError: one of the options is out of range.
    """
    if arguments.tokens < 1:
        raise UserError(f"--tokens {arguments.tokens} must be 1 or more")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed {arguments.seed} must be from 0 to 2^63 - 1")
    return Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
