"""Which start of a job this is, by the launchers' variables."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from i3dist.distributed.attempt import BATCH_SHELL, LOST_HOSTS, Attempt, ask_for_successor

SLURM = {"SLURM_JOB_ID": "80"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "2"}


@pytest.mark.parametrize(
    ("environ", "attempt", "text"),
    [
        ({}, Attempt(), ""),
        (SLURM, Attempt("80"), ", job 80"),  # the first run has no count
        (SLURM | {"SLURM_RESTART_COUNT": "3"}, Attempt("80", 3), ", job 80, restart 3"),
        (SLURM | {"SLURM_RESTART_COUNT": "x"}, Attempt("80"), ", job 80"),
        (
            SLURM
            | {"SLURM_RESTART_COUNT": "3"}
            | {"I3DIST_FIRST_JOB": "77", "I3DIST_EARLIER_RESTARTS": "2"},
            Attempt("77", 5),  # a job that succeeds another goes on with its name and count
            ", job 77, restart 5",
        ),
        (TORCHRUN, Attempt("a", 2), ", job a, restart 2"),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, Attempt("none", 2), ", restart 2"),
        (SLURM | TORCHRUN, Attempt("a", 2), ", job a, restart 2"),  # its agents stay the same job
    ],
    ids=str,
)
def test_it_is_what_the_launcher_says(
    environ: Mapping[str, str], attempt: Attempt, text: str
) -> None:
    assert Attempt.detect(environ) == attempt and str(attempt) == text


def test_the_batch_shell_is_told_of_lost_hosts(tmp_path: Path) -> None:
    """It finds their names when the signal comes; without such a shell nobody is signalled."""
    script = 'trap "cat $0; exit 7" USR2; echo; while :; do sleep 0.05; done'
    words = ["bash", "-c", script, str(tmp_path / "hosts")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None and shell.stdout.readline() == "\n"
        there = {LOST_HOSTS: str(tmp_path / "hosts"), BATCH_SHELL: str(shell.pid)}
        ask_for_successor([], there)
        assert not (tmp_path / "hosts").exists()
        ask_for_successor(["node2", "node3"], there)
        assert shell.stdout.read() == "node2,node3" and shell.wait(10) == 7
    ask_for_successor(["node2"], {})


def test_a_job_without_a_name_is_not_called_none() -> None:
    assert Attempt("77").name == "job 77"
    assert Attempt().name == Attempt("none").name == "this job"
