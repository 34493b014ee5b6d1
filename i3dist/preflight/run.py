"""The preflight itself: all ranks gather facts, rank 0 prints a table, and all refuse alike."""

import os
import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from i3dist.distributed import collectives
from i3dist.distributed.job import Job, host_name
from i3dist.errors import UserError
from i3dist.preflight.checks import Outcome, examine
from i3dist.preflight.facts import (
    Facts,
    Given,
    free_bytes,
    hash_sources,
    package_versions,
)
from i3dist.preflight.findings import Everyone, hosts
from i3dist.preflight.gpu import describe_gpu
from i3dist.preflight.measure import exchange_rate, read_clock, token_in
from i3dist.tracking.origin import git_head

WIDTH = 100
SKIP = "--no-preflight starts all the same"


def check(given: Given, job: Job) -> None:
    """Check that the hosts of a job fit together; every rank calls this, inside the process group.

    Prints a table on rank 0.

    Args:
        given: what this rank made of its command line.
        job: this rank's place.

    Raises:
        UserError: on every rank, if something is wrong on any.
    """
    began = time.perf_counter()
    everyone = collectives.gather_objects(gather(given, job))
    outcomes = examine(everyone)
    if job.rank == 0:
        print_table(outcomes, everyone, time.perf_counter() - began)
    refuse(outcomes)


def gather(given: Given, job: Job) -> Facts:
    """This rank's facts; every rank calls this."""
    host = host_name()
    with token_in(given.folder, job) as (token, unwritable):
        free = free_bytes(given.folder)
        clock = read_clock()  # waits for all ranks, so that all have read the file
    return Facts(
        rank=job.rank,
        host=host,
        pid=os.getpid(),
        given=given,
        sources=hash_sources(),
        commit=git_head(),
        versions=package_versions(),
        token=token,
        unwritable=unwritable,
        free=free,
        clock=clock,
        gpu=describe_gpu(),
        rate=exchange_rate(job, collectives.gather_objects(host)),
    )


def print_table(outcomes: list[Outcome], everyone: Everyone, seconds: float) -> None:
    """Print what was found, a line for each check, and each finding below."""
    names = hosts(everyone)
    counted = f"{len(names)} host{'s'[: len(names) > 1]}, {len(everyone)} ranks, {seconds:.1f} s"
    table = Table(title=f"preflight: {counted}", title_justify="left")
    for head in ("check", "found", ""):
        table.add_column(head)
    for outcome in outcomes:
        wrong = any(finding.refuses for finding in outcome.findings)
        verdict = "refused" if wrong else "warning" if outcome.findings else "ok"
        table.add_row(outcome.name, Text(outcome.shown), verdict)
    Console(width=WIDTH).print(table)
    for finding in (finding for outcome in outcomes for finding in outcome.findings):
        print(f"{'preflight' if finding.refuses else 'warning'}: {finding}", flush=True)


def refuse(outcomes: list[Outcome]) -> None:
    """Raise the first finding that refuses the job, with the number of others.

    Raises:
        UserError: there is one.
    """
    refused = [finding for outcome in outcomes for finding in outcome.findings if finding.refuses]
    if refused:
        finding = refused[0]
        more = f" (and {len(refused) - 1} more, above)" if len(refused) > 1 else ""
        skip = "" if any(finding.ends_anyway for finding in refused) else f"; {SKIP}"
        raise UserError(f"preflight: {finding}{more}{skip}")
