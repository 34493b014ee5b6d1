"""Say how a run fares: `python launch/status.py RUN`, from any host that sees its folder.

Reads the run's folder and touches nothing. Shows step, loss and its trend, speed, when the run will
end, the newest checkpoint, how often the run was started, and what a person should look at. With
--watch it shows this again every few seconds, until the run stops.

exit status:
  0  the run starts or trains
  1  there is no such run
  2  it has ended: all steps are taken
  3  it was asked to stop, and waits to be started again
  4  it failed, or its process is gone
  5  it is silent: it hangs, is suspended, or is gone with its host
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from i3dist.cli.amounts import duration, short
from i3dist.cli.paths import typed_path
from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.errors import UserError
from i3dist.report.status import State, Status, read_status

STATUS: dict[State, int] = {
    "starting": 0,
    "training": 0,
    "ended": 2,
    "waiting": 3,
    "failed": 4,
    "silent": 5,
}
GB = 1e9
LEAST_PAUSE, MOST_PAUSE = 0.1, 86_400  # of --watch, in seconds


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=typed_path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="show it again every so many seconds (default: 10)",
    )
    return parser.parse_args()


def lines(status: Status) -> Iterator[tuple[str, str]]:
    """What to show: topics, and what is known of each."""
    last = status.last
    yield "run", f"{status.folder}"
    yield "state", f"{status.state}: {status.why}" if status.why else status.state
    yield "step", f"{status.step:,} of {status.steps:,} ({status.step / status.steps:.1%})"
    if last:
        loss = last.get("mean_loss", last.get("loss"))
        yield "loss", "not a number" if loss is None else f"{loss:.4f}{_trend(status.trend)}"
        yield "speed", _speed(status)
    if status.straggling is not None:
        much = f"{status.straggling - 1:.0%} more time than the fastest"
        yield "slowest", f"rank {last.get('slowest_rank')}, which computes {much}"
    if status.eta is not None and STATUS[status.state] == 0:
        end = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + status.eta))
        yield "ETA", f"{duration(status.eta).strip()} ({end})"
    yield "saved", _saved(status)
    counted = ", ".join(
        f"{count} {name}{'s'[: count != 1]}"
        for name in ("requeue", "failure")
        if (count := status.stops.get(name, 0))
    )
    yield (
        "started",
        f"{status.starts} time{'s'[: status.starts != 1]}" + (f" ({counted})" if counted else ""),
    )
    yield "disk", f"{status.free / GB:,.1f} GB left" + _room(status)
    for warning in status.warnings():
        yield "warning", warning


def _trend(trend: float | None) -> str:
    if not trend:
        return "" if trend is None else ", steady"
    return f", {'rises' if trend > 0 else 'falls'} by {abs(trend):.3g} in 1,000 steps"


def _speed(status: Status) -> str:
    speed, mfu = status.last.get("tokens_per_second"), status.last.get("mfu")
    text = "unknown" if speed is None else f"{short(speed).strip()} tok/s"
    return text if mfu is None else f"{text}, MFU {mfu:.0%}"


def _saved(status: Status) -> str:
    saved = status.checkpoint
    if saved is None:
        return "no checkpoint yet"
    return f"step {saved.step:,}, {duration(saved.age).strip()} ago ({saved.size / GB:.2f} GB)"


def _room(status: Status) -> str:
    saved = status.checkpoint
    return f", room for {status.free // saved.size:,} checkpoints" if saved and saved.size else ""


def shown(status: Status) -> Text:
    """The lines as one text."""
    return Text("\n".join(f"{topic:<9} {text}" for topic, text in lines(status)))


def watch(run: Path, pause: float) -> Status:
    """Show the run's status every `pause` seconds until it stops, and return its last.

    A terminal shows the newest alone; what is no terminal gets each, and an empty line.
    """
    console = Console()
    with (
        Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live
    ):
        while True:
            status = read_status(run)
            if live is None:
                print(shown(status), end="\n\n", flush=True)
            else:
                live.update(shown(status), refresh=True)
            if STATUS[status.state] != 0:
                return status
            time.sleep(pause)


def main() -> None:
    """Show the run's status, once or until it stops, and exit with it."""
    arguments = parse_arguments()
    pause = arguments.watch
    if pause is None:
        status = read_status(arguments.run)
        print(shown(status))
    elif not LEAST_PAUSE <= pause <= MOST_PAUSE:
        raise UserError(
            f"--watch {pause:g}: name a number of seconds from {LEAST_PAUSE} to {MOST_PAUSE:,}"
        )
    else:
        status = watch(arguments.run, pause)
    sys.exit(STATUS[status.state])


def start() -> None:
    """Run the program."""
    with one_line_errors(output_is_result=True):
        main()


if __name__ == "__main__":
    start()
