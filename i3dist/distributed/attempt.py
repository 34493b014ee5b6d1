"""Which start of a job this is: launchers start the same command again by themselves."""

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: failed for now, start it again
TIME = "%Y-%m-%d %H:%M:%S"  # how the log says when something happened
# Set by slurm/train.sbatch in a job that succeeds another: the first job's id, and how often it was
# started again before.
FIRST_JOB, EARLIER_RESTARTS = "I3DIST_FIRST_JOB", "I3DIST_EARLIER_RESTARTS"
# Also set there: which file takes the names of lost hosts, and the shell that then gets SIGUSR2.
LOST_HOSTS, BATCH_SHELL = "I3DIST_LOST_HOSTS", "I3DIST_BATCH_SHELL"
# And a file that any rank may make, to have the job requeued.
REQUEUE_FILE = "I3DIST_REQUEUE_FILE"
UNNAMED = "none"  # torchrun's id of a job that --rdzv-id gives no name


@dataclass(frozen=True)
class Attempt:
    """One start of a job.

    `job` is its id, which stays when the launcher starts it again (None: this launcher never does);
    `restarts` counts how often that has happened.
    """

    job: str | None = None
    restarts: int = 0

    @staticmethod
    def detect(environ: Mapping[str, str] = os.environ) -> "Attempt":
        """Read the attempt from the variables of Slurm or torchrun."""
        if "TORCHELASTIC_RUN_ID" in environ:
            restarts = _number(environ, "TORCHELASTIC_RESTART_COUNT")
            return Attempt(environ["TORCHELASTIC_RUN_ID"], restarts)
        if "SLURM_JOB_ID" not in environ:
            return Attempt()
        restarts = _number(environ, "SLURM_RESTART_COUNT") + _number(environ, EARLIER_RESTARTS)
        return Attempt(environ.get(FIRST_JOB) or environ["SLURM_JOB_ID"], restarts)

    @property
    def name(self) -> str:
        """Such as "job 77"."""
        return "this job" if self.job in (None, UNNAMED) else f"job {self.job}"

    def __str__(self) -> str:
        """Such as ", job 77, restart 1"; nothing where nobody starts the job again."""
        restart = f", restart {self.restarts}" if self.restarts else ""
        job = "" if self.job == UNNAMED else f", {self.name}"
        return "" if self.job is None else f"{job}{restart}"


def ask_for_successor(hosts: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    """Have slurm/train.sbatch submit this job again without these hosts; only rank 0 calls this.

    It runs on the host of the batch shell. Without that shell, or without hosts, nothing happens.
    """
    if hosts and LOST_HOSTS in environ and BATCH_SHELL in environ:
        Path(environ[LOST_HOSTS]).write_text(",".join(hosts))
        os.kill(int(environ[BATCH_SHELL]), signal.SIGUSR2)


def ask_for_requeue(environ: Mapping[str, str] = os.environ) -> None:
    """Have slurm/train.sbatch requeue this job whatever srun returns; any rank may call this.

    Where a rank hangs srun may have to kill it, and then returns that signal's status, not 75. The
    file is beside the ranks' output; it may block where that hangs.
    """
    if REQUEUE_FILE in environ:
        with suppress(OSError):  # a folder that this host does not see
            Path(environ[REQUEUE_FILE]).touch()


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0
