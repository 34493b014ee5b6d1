"""Soak test: end a run at random moments in random ways, type the same command again, compare.

    python -m tests.faults.soak --minutes 20 --seed 0

Round after round a tiny model is trained on two ranks under the deepspeed launcher, and ended a few
times on its way: one rank killed, all killed, one rank or the launcher told to stop. Then it is
left to finish, and must be the undisturbed run bit for bit: losses, ledger, weights, optimizer and
lanes. No process, unfinished file or shared memory may be left. Status 0: every round was so.
Status 1: one line says what was not, and the folder of runs stays.
"""

import argparse
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.distributed.attempt import REQUEUE
from i3dist.errors import UserError
from i3dist.files import PARTIAL
from tests.conftest import QUICK, differences, last_checkpoint, shards_of, texts
from tests.faults.running import Running, running

STEPS = 40  # take about as long as starting does
RANKS = 2
ENDINGS_A_ROUND = 6
# Share of the endings; the others strike within this share of training after a start's first step.
WHILE_STARTING = 0.25
WHILE_TRAINING = 0.33

Ending = Callable[[Running, random.Random], None]


def kill_one_rank(job: Running, chance: random.Random) -> None:
    chance.choice(job.ranks()).kill()


def kill_all(job: Running, chance: random.Random) -> None:
    """As a host that goes down does: launcher and readers of data too."""
    for process in job.processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()


def terminate_one_rank(job: Running, chance: random.Random) -> None:
    chance.choice(job.ranks()).terminate()


def signal_one_rank(job: Running, chance: random.Random) -> None:
    chance.choice(job.ranks()).send_signal(signal.SIGUSR1)


def terminate_launcher(job: Running, chance: random.Random) -> None:
    job.launcher().terminate()


ENDINGS: dict[Ending, str] = {
    kill_one_rank: "SIGKILL to one rank",
    kill_all: "SIGKILL to all",
    terminate_one_rank: "SIGTERM to one rank",
    signal_one_rank: "SIGUSR1 to one rank",
    terminate_launcher: "SIGTERM to the launcher",
}
TOLD_TO_STOP = (terminate_one_rank, signal_one_rank)


class Soak:
    """Rounds of one seed, and what was done in them."""

    def __init__(
        self,
        data: Path,
        folder: Path,
        seed: int,
        steps: int = STEPS,
        endings: int = ENDINGS_A_ROUND,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Each round ends a run of `steps` so many times; `folder` is for the runs.

        `tell` hears what is being done.
        """
        self.folder = folder
        self.chance = random.Random(seed)
        self.steps = steps
        self.endings = endings
        self.tell = tell
        self.words = [*QUICK, f"data.path={data}", f"train.steps={steps}", "validate.every=10"]
        self.whole = folder / "undisturbed"
        self.rounds = 0
        self.ended: Counter[str] = Counter()
        self.ended_in_start = 0
        self.continued = 0  # starts from a checkpoint
        self.start_seconds = self.training_seconds = 0.0

    def train_undisturbed(self) -> None:
        """Make the run that every round's is compared with, and see how long its parts take."""
        self.tell("the undisturbed run")
        with running(self.folder / "undisturbed.out", *self.words, f"run.path={self.whole}") as job:
            wait_for_ranks(job)
            begun = time.monotonic()
            wait_for_step(job)
            self.start_seconds = time.monotonic() - begun
            wait_for_step(job, self.steps)
            self.training_seconds = time.monotonic() - begun - self.start_seconds
            if job.command.wait(600) != 0:
                raise UserError(f"the undisturbed run fails, see {job.output}")

    def round(self) -> None:
        """Train one run, ended some times, to its end.

        Raises:
            UserError: something is not as it should be.
        """
        self.rounds += 1
        run = self.folder / f"round-{self.rounds}"
        # Settings that must not change what is computed.
        workers, every = self.chance.randrange(3), self.chance.randint(1, 6)
        words = [f"run.path={run}", f"data.workers={workers}", f"checkpoint.every={every}"]
        endings: list[Ending | None] = [*self.chance.choices(list(ENDINGS), k=self.endings), None]
        for number, ending in enumerate(endings, start=1):
            output = self.folder / f"round-{self.rounds}.{number}.out"
            started = time.time()
            if self._done(run, words, output, ending):
                break
        self._compare(run, started, output)
        shutil.rmtree(run)

    def _done(self, run: Path, words: list[str], output: Path, ending: Ending | None) -> bool:
        """Start the run, end it so, or let it finish; returns whether it has."""
        saved = newest(run)
        what = "left to finish" if ending is None else ENDINGS[ending]
        self.tell(f"round {self.rounds}, from step {saved}: {what}")
        with running(output, *self.words, *words) as job:
            trains = ending is not None and self._end(job, ending)
            try:
                status = job.command.wait(120 + 10 * (self.start_seconds + self.training_seconds))
            except subprocess.TimeoutExpired:
                raise UserError(f"the job goes on and on, see {output}") from None
            wait_until_empty(job)
        said = job.said()
        wrong = misbehaviour(said, saved, newest(run))
        if wrong is None and status not in (0, REQUEUE) and trains and ending in TOLD_TO_STOP:
            wrong = f"a job that was told to stop returned {status}"
        if wrong is None and status != 0 and ending is None:
            wrong = f"a job that was left alone returned {status}"
        if wrong is not None:
            raise UserError(f"{wrong}; see {output}")
        self.continued += "continued from step" in said
        return status == 0

    def _end(self, job: Running, ending: Ending) -> bool:
        """End a job at a random moment; returns whether it took steps by then."""
        wait_for_ranks(job)
        starting = self.chance.random() < WHILE_STARTING
        if not starting:
            wait_for_step(job)
        longest = self.start_seconds if starting else WHILE_TRAINING * self.training_seconds
        with suppress(subprocess.TimeoutExpired):
            job.command.wait(self.chance.uniform(0, longest))
        trains = took(job.said())
        with suppress(psutil.NoSuchProcess, ValueError, IndexError):  # it may be through
            ending(job, self.chance)
            self.ended[ENDINGS[ending]] += 1
            self.ended_in_start += not trains
        return trains

    def _compare(self, run: Path, started: float, output: Path) -> None:
        """See that a finished run is the undisturbed one, and has left nothing."""
        wrong = differences(run, self.whole)
        wrong += [f"{path} is left" for path in run.rglob(f".*{PARTIAL}")]
        for path in Path("/dev/shm").glob("deepspeed_*"):  # which DeepSpeed never removes
            wrong += [f"{path} is left"] * (path.stat().st_mtime > started)
        if wrong:
            raise UserError(f"{run} and {self.whole} differ: {'; '.join(wrong)}; see {output}")


def misbehaviour(said: str, saved: int, now: int) -> str | None:
    """What in a job's words is wrong, or None, given the checkpoint's step before it and after."""
    if "Traceback" in said:
        return "a traceback"
    if now < saved:
        return f"the checkpoint of step {saved} is gone, {now} is the newest"
    if took(said) and (f"continued from step {saved}\n" in said) != (saved > 0):
        return f"the job did not go on from step {saved}"
    stopped = re.search(r"stopped on request at step (\d+)", said)
    if stopped is not None and int(stopped[1]) != now:
        return f"the job stopped at step {stopped[1]} and had saved step {now}"
    return None


def newest(run: Path) -> int:
    """Step of a run's newest checkpoint; 0 without any."""
    try:
        return int(last_checkpoint(run).removeprefix("step-"))
    except FileNotFoundError:
        return 0


def wait_for_ranks(job: Running) -> None:
    """Until all are there, or the job ends."""
    while job.command.poll() is None:
        with suppress(ValueError, psutil.Error):  # there is no launcher yet
            if len(job.ranks()) == RANKS:
                return
        time.sleep(0.02)


def took(said: str, step: object = r"\d+") -> bool:
    """Whether a job has reported a step, or any."""
    return re.search(rf"^step +{step}/", said, re.MULTILINE) is not None


def wait_for_step(job: Running, step: object = r"\d+") -> None:
    """Until a step, or any, is reported, or the job ends."""
    while job.command.poll() is None and not took(job.said(), step):
        time.sleep(0.02)


def wait_until_empty(job: Running) -> None:
    """Until the last process of a job that has ended is gone: readers of data take seconds."""
    deadline = time.monotonic() + 30
    while left := job.processes():
        if time.monotonic() > deadline:
            lines = [" ".join(process.cmdline())[:80] for process in left]
            raise UserError(f"processes are left: {'; '.join(lines)}; see {job.output}")
        time.sleep(0.1)


def table(soak: Soak, seconds: float) -> Table:
    """What was done."""
    shown = Table("what", "times", title=f"{seconds / 60:.0f} minutes, every run equal bit for bit")
    for name in ENDINGS.values():
        shown.add_row(name, str(soak.ended[name]))
    shown.add_row("  of these before the first step", str(soak.ended_in_start))
    shown.add_row("continued from a checkpoint", str(soak.continued))
    shown.add_row("rounds", str(soak.rounds))
    return shown


def soak_for(minutes: float, soak: Soak) -> None:
    """Round after round, at least one, until the time is over."""
    soak.train_undisturbed()
    end = time.monotonic() + minutes * 60
    while soak.rounds == 0 or time.monotonic() < end:
        soak.round()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=20, help="no round begins later (default: 20)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of moments, endings and settings (default: 0)"
    )
    return parser.parse_args()


def main() -> None:
    """Soak, and say what was done."""
    arguments = parse_arguments()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    began = time.monotonic()
    console = Console()
    columns = (TextColumn("{task.description}"), SpinnerColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("making data")
        data = shards_of(texts(), folder, "--vocab-size", 512)
        tell = partial(progress.update, task)
        soak = Soak(data, folder, arguments.seed, tell=lambda text: tell(description=text))
        soak_for(arguments.minutes, soak)
        tell(description="done")
    console.print(table(soak, time.monotonic() - began))
    shutil.rmtree(folder)


if __name__ == "__main__":
    with one_line_errors():
        main()
