"""Talk with a trained model: `python launch/chat.py --checkpoint RUN`.

Each line that is typed is a message. Its answer is printed as it is sampled, and Ctrl-C stops it.
The model goes on from what was said before and reads nothing twice; its memory stays constant
however long the conversation runs. /quit or the end of input ends it.

Train on conversations (data_prep/shard.py --format chat): a model of plain text does not answer.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGINT, signal
from threading import Event

from i3dist.checkpoint.weights import load_run
from i3dist.cli import streams
from i3dist.cli.model_options import add_model_arguments
from i3dist.cli.paths import typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.data.chat import read_conversation, write_conversation
from i3dist.distributed import devices
from i3dist.errors import UserError
from i3dist.inference.chat import Chat
from i3dist.programs.sampling import add_sampling_arguments, sampling_of
from i3dist.tracking.origin import CHAT, TEXT, data_format


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument(
        "--conversation",
        type=typed_path,
        metavar="FILE",
        help="keep the conversation in this file, and go on with it if the file is there: a line "
        "of jsonl, written after each answer, which data_prep/shard.py --format chat reads too",
    )
    add_sampling_arguments(parser, tokens="most tokens of an answer")
    return parser.parse_args()


def beginning(system: str | None, file: Path | None) -> list[dict[str, str]]:
    """What was said before: the conversation in the file, or the message of the system.

    Raises:
        UserError: the file cannot be read or could not be written, or begins otherwise.
    """
    if file and not file.parent.is_dir():
        raise UserError(f"--conversation {file}: there is no folder {file.parent}; make it first")
    said = read_conversation(file) if file and file.exists() else []
    if system is None:
        return said
    if not system.strip():
        raise UserError("--system has no text: write one, or leave it out")
    first = {"role": "system", "content": system}
    if said and said[0] != first:
        raise UserError(
            f"{file} begins with another message than --system: leave --system out, or name "
            "another file"
        )
    return said or [first]


def note(checkpoint: Path) -> str | None:
    """What the user should know of a model that may not answer."""
    doubts = {
        CHAT: None,
        TEXT: "was trained on text, not on conversations",
        None: "does not say whether it was trained on conversations",
    }
    doubt = doubts.get(data_format(checkpoint))
    return doubt and f"note: {checkpoint} {doubt}: it may not answer"


def typed_lines() -> Iterator[str]:
    """Messages from standard input, up to /quit or its end.

    Raises:
        UserError: standard input is closed or not UTF-8.
    """
    if sys.stdin is None:
        raise UserError("standard input is closed: type messages, or send them through a pipe")
    typing = sys.stdin.isatty()
    if typing:
        with suppress(ImportError):
            import readline  # noqa: F401  # keys that edit the line
    while True:
        try:
            line = input("> " if typing else "").strip()
            line.encode()  # in some locales bytes that are not UTF-8 get here
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/quit ends)")
            continue
        except UnicodeError:
            raise UserError(
                "standard input is not UTF-8 text: convert it, for instance with "
                "iconv -f latin1 -t utf-8"
            ) from None
        if line == "/quit":
            return
        if line:
            yield line


@contextmanager
def interruptible() -> Iterator[Event]:
    """Yield what the first Ctrl-C sets; the second one interrupts as ever."""
    pressed = Event()

    def press(*_: object) -> None:
        pressed.set()
        signal(SIGINT, before)

    before = signal(SIGINT, press)
    try:
        yield pressed
    finally:
        signal(SIGINT, before)


def answer(chat: Chat, text: str) -> None:
    """Print the answer to a message."""
    with interruptible() as pressed:
        for piece in chat.say(text):
            sys.stdout.write(piece)
            sys.stdout.flush()
            if pressed.is_set():
                chat.stop()
    sys.stdout.write("\n")
    sys.stdout.flush()


def main() -> None:
    """Answer until input ends."""
    arguments = parse_arguments()
    file, sampling = arguments.conversation, sampling_of(arguments)
    streams.require_output()
    said = beginning(arguments.system, file)
    device = devices.pick_device(arguments.device)
    model, _, tokenizer = load_run(arguments.checkpoint, device)
    if doubt := note(arguments.checkpoint):
        print(doubt, file=sys.stderr)
    chat = Chat(model, tokenizer, said, arguments.tokens, sampling, arguments.seed)
    for line in typed_lines():
        answer(chat, line)
        if file:
            write_conversation(file, chat.messages)


def start() -> None:
    """Run the program."""
    with one_line_errors(output_is_result=True):
        main()


if __name__ == "__main__":
    start()
