"""Which start of a job this is: launchers start the same command again by themselves."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

# Set by slurm/train.sbatch in a job that succeeds another: the first job's id, and how often it was
# started again before.
FIRST_JOB, EARLIER_RESTARTS = "I3DIST_FIRST_JOB", "I3DIST_EARLIER_RESTARTS"


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

    def __str__(self) -> str:
        if self.job is None:
            return "no job that is started again"
        return f"job {self.job}, restart {self.restarts}" if self.restarts else f"job {self.job}"


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0
