"""Continue a prompt with a model: `python launch/generate.py --checkpoint RUN --prompt TEXT`.

Text is printed as it is sampled. The model compresses every 512 tokens that it has read, so memory
stays constant however long it runs.
"""

import argparse
import sys

from i3dist import garbage
from i3dist.cli import streams
from i3dist.cli.model_options import add_model_arguments
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.distributed.cuda_driver import start_driver
from i3dist.errors import UserError
from i3dist.programs.sampling import add_sampling_arguments, sampling_of


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--prompt", help="text to continue (default: standard input)")
    add_sampling_arguments(parser, tokens="most new tokens")
    parser.add_argument(
        "--ignore-eos",
        action="store_true",
        help="begin another document where one ends, instead of stopping",
    )
    return parser.parse_args()


def read_prompt(given: str | None) -> str:
    """The text to continue, as given or from standard input.

    Raises:
        UserError: there is none, or it is not UTF-8.
    """
    if given is None and sys.stdin is None:
        raise UserError("standard input is closed: give a --prompt")
    try:
        # Without a locale any bytes are read: those that are not text fail here.
        prompt = sys.stdin.read() if given is None else given
        prompt.encode()
    except UnicodeError:
        what, way = "--prompt", "write it in UTF-8"
        if given is None:
            what, way = "standard input", "convert it, for instance with iconv -f latin1 -t utf-8"
        raise UserError(f"{what} is not UTF-8 text: {way}") from None
    return prompt


def main() -> None:
    """Stream a continuation to standard output."""
    arguments = parse_arguments()
    sampling = sampling_of(arguments)
    streams.require_output()
    prompt = read_prompt(arguments.prompt)
    garbage.pause()  # until the first text
    start_driver(arguments.device)
    # These import torch, which takes seconds.
    from i3dist.checkpoint.weights import SavedModel
    from i3dist.distributed import devices
    from i3dist.inference.generate import generate
    from i3dist.inference.prompt import compile_ahead

    device = devices.pick_device(arguments.device)
    saved = SavedModel.find(arguments.checkpoint)
    tokenizer = saved.tokenizer
    compile_ahead(saved.settings.model, 1 + len(tokenizer.encode(prompt)), device)
    model = saved.as_model(device, None)
    sys.stdout.write(prompt)
    for text in generate(
        model, tokenizer, prompt, arguments.tokens, sampling, arguments.seed, arguments.ignore_eos
    ):
        sys.stdout.write(text)
        sys.stdout.flush()
        garbage.resume(collect=False)
    sys.stdout.write("\n")


def start() -> None:
    """Run the program."""
    with one_line_errors(output_is_result=True):
        main()


if __name__ == "__main__":
    start()
