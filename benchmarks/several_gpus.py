"""The model card on several GPUs of one host, through launch/train.py and its launchers.

    python benchmarks/several_gpus.py --data DIR --json FILE [--only speed start continued ...]

Parts, each of runs of its own:

  speed      tokens a second on one GPU and on all, at 4 and at 16 lanes a GPU, after warm-up
  start      seconds from the command to the first steps, in the order in which the runs came
  continued  a run that is told to stop and continued, against one that is not: its weights
  ranks      a run on all GPUs, then on one, then on all, against one on all: its ledger
  ended      seconds until a job is over, one of whose ranks is killed or stopped

DIR is made by data_prep/shard.py with the card's 32,000 entries and chunks of 512 tokens.
"""

import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.errors import UserError

ROOT = Path(__file__).parent.parent
LANES = (4, 16)  # a GPU
SETTINGS = ["tracking.enabled=false", "validate.every=0", "checkpoint.every=0", "log.every=5"]
SETTINGS += ["log.diagnose_every=0", "train.seed=0", "optimizer.decay_steps=1000"]
STEPS = 40
WARM = 2  # first lines of a run's log that do not count
HANG_SECONDS = 20
PATIENCE = 400.0


@dataclass
class Run:
    """A command under way, and what it has printed, line by line, and when."""

    process: subprocess.Popen[str]
    started: float
    lines: list[tuple[float, str]] = field(default_factory=list)

    def wait_for(self, text: str) -> float:
        """Seconds from the start to the first line that holds a text."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for when, line in list(self.lines):
                if text in line:
                    return when - self.started
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise UserError(f"no {text!r} in: {self.output()[-2000:]}")

    def end(self) -> int:
        """Wait for the end; returns the status."""
        return self.process.wait(PATIENCE)

    def output(self) -> str:
        """All of it."""
        return "\n".join(line for _, line in self.lines)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        ranks = [p for p in started if "launch/train.py" in p.cmdline()[:4]]
        readers = {child.pid for rank in ranks for child in rank.children(recursive=True)}
        for process in ranks:
            if process.pid not in readers and process.environ().get("RANK") == str(number):
                return process
        raise UserError(f"no rank {number} in: {self.output()[-2000:]}")


class Host:
    """Starts runs on the GPUs of this host, and keeps what they leave in a folder."""

    def __init__(self, data: Path, folder: Path, gpus: int, settings: Sequence[str]):
        self.data = data
        self.folder = folder
        self.gpus = gpus
        self.settings = settings
        self.port = 29_500
        self.starts: list[dict[str, Any]] = []

    @contextmanager
    def train(
        self, name: str, gpus: int, *words: str, launcher: str = "deepspeed"
    ) -> Iterator[Run]:
        """launch/train.py on so many GPUs, with these settings, in the run folder of this name."""
        self.port += 1
        port = str(self.port)
        command = {
            "deepspeed": ["deepspeed", "--num_accelerators", str(gpus), "--master_port", port],
            "torchrun": ["torchrun", "--nproc_per_node", str(gpus), "--master_port", port],
        }[launcher]
        places = [f"data.path={self.data}", f"run.path={self.folder / name}"]
        run = Run(
            subprocess.Popen(
                [*command, "launch/train.py", *SETTINGS, *self.settings, *places, *words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            ),
            time.monotonic(),
        )
        reader = threading.Thread(target=self._read, args=(run,), daemon=True)
        reader.start()
        try:
            yield run
        finally:
            for process in (*left_of(run.process.pid), run.process):
                process.kill()
            reader.join(5)
            print(f"[{name}, {gpus} GPUs, {launcher}] {' '.join(words)}", flush=True)

    def _read(self, run: Run) -> None:
        assert run.process.stdout is not None
        for line in run.process.stdout:
            run.lines.append((time.monotonic(), line.rstrip()))

    def finish(self, name: str, gpus: int, *words: str) -> Path:
        """Train to the end; returns the run's folder."""
        with self.train(name, gpus, *words) as run:
            seconds = run.wait_for("step ")
            if status := run.end():
                raise UserError(f"{name} left with {status}: {run.output()[-3000:]}")
        self.starts.append({"run": name, "gpus": gpus, "seconds_to_step_5": round(seconds, 1)})
        return self.folder / name

    def speed(self) -> list[dict[str, Any]]:
        """Tokens a second at each number of lanes, on one GPU and on all."""
        rows = []
        for lanes in LANES:
            for gpus in (1, self.gpus):
                words = (f"train.lanes={lanes * gpus}", f"train.steps={STEPS}")
                run = self.finish(f"speed-{lanes}-{gpus}", gpus, *words)
                lines = (run / "metrics.jsonl").read_text().splitlines()[WARM:]
                speeds = [json.loads(line)["tokens_per_second"] for line in lines]
                rows.append({"lanes_a_gpu": lanes, "gpus": gpus, "tokens_per_second": speeds})
        return rows

    def start(self) -> list[dict[str, Any]]:
        """Seconds to the first steps of every run so far."""
        return self.starts

    def continued(self) -> dict[str, Any]:
        """Whether a run that was told to stop, and continued, ends with the same weights."""
        words = (f"train.lanes={4 * self.gpus}", f"train.steps={STEPS}")
        whole = self.finish("whole", self.gpus, *words)
        with self.train("stopped", self.gpus, *words) as run:
            run.wait_for(" 10/")
            run.rank(self.gpus - 1).send_signal(signal.SIGUSR1)
            run.end()
            stopped = next(line for _, line in run.lines if "stopped as asked" in line)
        again = self.finish("stopped", self.gpus, *words)
        hashes = [sha256(run / "model.safetensors") for run in (whole, again)]
        return {"stopped": stopped, "same_weights": hashes[0] == hashes[1], "sha256": hashes}

    def ranks(self) -> dict[str, Any]:
        """Whether a run that changes its number of GPUs twice takes the same steps."""
        words = (f"train.lanes={4 * self.gpus}", "train.micro_batch=4")
        whole = self.finish("alike", self.gpus, *words, f"train.steps={STEPS}")
        for steps, gpus in ((10, self.gpus), (20, 1), (STEPS, self.gpus)):
            changed = self.finish("changed", gpus, *words, f"train.steps={steps}")
        checked = subprocess.run(
            [sys.executable, "launch/ledger.py", whole, changed, "--tolerance", "0.05"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        losses = [
            [json.loads(line)["loss"] for line in (run / "ledger.jsonl").read_text().splitlines()]
            for run in (whole, changed)
        ]
        largest = max(abs(a - b) for a, b in zip(*losses, strict=True))
        return {"status": checked.returncode, "says": checked.stdout, "largest_difference": largest}

    def ended(self) -> list[dict[str, Any]]:
        """Seconds until a job is over when its last rank is killed, or stopped."""
        limit = f"guard.hang_seconds={HANG_SECONDS}"
        cases = [
            ("deepspeed", signal.SIGKILL, ()),
            ("torchrun", signal.SIGKILL, ()),
            ("deepspeed", signal.SIGSTOP, (limit,)),
        ]
        return [self._end(*case) for case in cases]

    def _end(self, launcher: str, number: signal.Signals, more: tuple[str, ...]) -> dict[str, Any]:
        words = (f"train.lanes={4 * self.gpus}", "train.steps=100000", *more)
        name = f"{launcher}-{number.name}"
        with self.train(name, self.gpus, *words, launcher=launcher) as run:
            run.wait_for(" 10/")
            victim = run.rank(self.gpus - 1)
            sent = time.monotonic()
            victim.send_signal(number)
            status = run.end()
            seconds = time.monotonic() - sent
            errors = [line for _, line in run.lines if "error: " in line]
            if victim.is_running():
                victim.kill()
        return {"launcher": launcher, "signal": number.name, "seconds": round(seconds, 1)} | {
            "status": status,
            "errors": errors[:4],
        }


def left_of(pid: int) -> list[psutil.Process]:
    """What a process has started and is still there."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def show_speed(rows: list[dict[str, Any]]) -> None:
    """Print a line for each, with the efficiency against one GPU."""
    alone = {r["lanes_a_gpu"]: statistics.median(r["tokens_per_second"]) for r in rows[::2]}
    for row in rows:
        speed, gpus = statistics.median(row["tokens_per_second"]), row["gpus"]
        share = speed / gpus / alone[row["lanes_a_gpu"]]
        print(f"{row['lanes_a_gpu']} lanes a GPU, {gpus} GPUs: {speed:,.0f} tokens/s, {share:.1%}")


def main() -> None:
    """Run the parts and write what they say after each."""
    parts = ("speed", "continued", "ranks", "ended", "start")
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="written to")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--settings", nargs="+", default=[], help="for every run")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found: dict[str, Any] = {"gpus": options.gpus, "device": device, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        host = Host(options.data.resolve(), Path(folder), options.gpus, options.settings)
        for part in options.only:
            run: Callable[[], Any] = getattr(host, part)
            try:
                found[part] = run()
            except UserError as error:  # the other parts stand by themselves
                found[part] = {"error": str(error)}
            print(part, json.dumps(found[part])[:600], flush=True)
            options.json.write_text(json.dumps(found, indent=1) + "\n")
            if part == "speed" and isinstance(found[part], list):
                show_speed(found[part])


if __name__ == "__main__":
    with one_line_errors():
        main()
