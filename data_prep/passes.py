"""Pass 1: spills all parts into runs, in any number of processes and tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.choice import ALL, Choice
from data_prep.evidence import Saved
from data_prep.formats import FORMATS
from data_prep.shuffle import PartSummary, Spiller, summary_path
from data_prep.sources import TEXT, Part
from data_prep.workers import Report, run_jobs
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.files import PARTIAL, write_whole

_CUT_SHORT = "a process ended while it read a part"


@dataclass(frozen=True)
class SpillPlan:
    """What pass 1 is to do."""

    parts: Sequence[Part]
    tokenizer: Path
    folder: Path
    seed: int
    format: str = TEXT
    choice: Choice = ALL

    def summary(self, number: int) -> PartSummary | None:
        """The summary of a part; None if the part is not finished, or its runs are not whole."""
        summary, part = PartSummary.load(summary_path(self.folder, number)), self.parts[number]
        if summary is None or summary.identity != part.identity:
            return None
        if not part.is_made_of(summary.pieces):
            return None
        return summary if summary.is_whole(self.folder) else None


@dataclass(frozen=True)
class SpillTask:
    """Spills parts, each given with its number."""

    tokenizer: Path
    folder: Path
    seed: int
    format: str
    choice: Choice
    goes_on: bool = False
    """Whether a part that cannot be read leaves the others to be done."""

    def start(self, report: Report) -> Callable[[tuple[int, Part]], UserError | None]:
        """A function that spills a part; returns why it could not, where it `goes_on`."""
        spiller = Spiller(
            Tokenizer.load(self.tokenizer),
            self.folder,
            self.seed,
            lambda tokens: report(0, tokens),
            FORMATS[self.format],
            self.choice,
        )

        def spill(job: tuple[int, Part]) -> UserError | None:
            number, part = job
            path = failure_path(self.folder, number)
            failure = Failure(message=_CUT_SHORT, files=tuple(sorted(part.files)))
            failure.write(path)  # for the case that this process dies
            summary_path(self.folder, number).unlink(missing_ok=True)  # of runs that are lost
            try:
                spiller.spill(part, number)
            except UserError as error:
                failure.model_copy(update={"message": str(error)}).write(path)
                if not self.goes_on:
                    raise
                return error
            path.unlink(missing_ok=True)
            report(1, 0)
            return None

        return spill


def spill_all(plan: SpillPlan, workers: int, report: Report) -> list[PartSummary]:
    """Spill the parts that are not finished yet; returns the summaries of all parts."""
    todo = _unfinished(plan, range(len(plan.parts)))
    report(len(plan.parts) - len(todo), 0)
    task = SpillTask(plan.tokenizer, plan.folder, plan.seed, plan.format, plan.choice)
    run_jobs(task, todo, workers, report)
    return [summary for summary in finished(plan) if summary]


def spill_some(
    plan: SpillPlan, numbers: Sequence[int], workers: int, report: Report
) -> list[UserError]:
    """Spill those of these parts that are not finished yet; returns what is wrong with others."""
    todo = _unfinished(plan, numbers)
    report(len(numbers) - len(todo), 0)
    task = SpillTask(plan.tokenizer, plan.folder, plan.seed, plan.format, plan.choice, goes_on=True)
    return [error for error in run_jobs(task, todo, workers, report, _worker_died) if error]


def _worker_died(job: tuple[int, Part]) -> UserError:
    return UserError(
        f"the worker process of part {job[0]} died (out of memory?); try fewer --workers"
    )


def _unfinished(plan: SpillPlan, numbers: Sequence[int]) -> list[tuple[int, Part]]:
    """Parts to be spilled with their numbers: new ones, then failed ones from the oldest failure.

    So a part that ends its process, for want of memory perhaps, does so when the others are done.
    What a killed process has left of these parts is removed.
    """
    todo = [number for number in numbers if not plan.summary(number)]
    todo.sort(key=lambda number: failed_at(plan.folder, number))
    unfinished = set(todo)
    for path in plan.folder.glob(f".part-*{PARTIAL}"):
        if int(path.name.split("-")[1].split(".")[0]) in unfinished:
            path.unlink(missing_ok=True)
    return [(number, plan.parts[number]) for number in todo]


class Failure(Saved):
    """Why a part that was begun is not finished, and the numbers of the files that it reads."""

    message: str
    files: tuple[int, ...]

    def write(self, path: Path) -> None:
        """Write it down; it is removed when the part is finished."""
        write_whole(path, self.model_dump_json().encode())


def failure_path(folder: Path, number: int) -> Path:
    """Path of the record of a failure to read part `number`."""
    return summary_path(folder, number).with_suffix(".failed")


def failed_at(folder: Path, number: int) -> int:
    """When part `number` failed, in ns; 0 if it did not."""
    try:
        return failure_path(folder, number).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def failures(folder: Path) -> list[Failure]:
    """What is wrong with parts that are not finished, in the order of their numbers."""
    paths = sorted(folder.glob("part-*.failed"))
    found = (Failure.load(path) for path in paths if not path.with_suffix(".json").exists())
    return [failure for failure in found if failure]


def finished(plan: SpillPlan) -> list[PartSummary | None]:
    """The summary of each part; None if the part is not finished."""
    return [plan.summary(number) for number in range(len(plan.parts))]


def forget_parts_of(
    plan: SpillPlan, touched: frozenset[int], broken: frozenset[int]
) -> frozenset[int]:
    """Forget the parts of touched files that were read only in part, so that all is read again.

    `broken` files are some of which a part could not be read. Returns the touched files that are to
    be read.
    """
    parts = list(zip(plan.parts, finished(plan), strict=True))
    done = {number: part for number, (part, summary) in enumerate(parts) if summary}
    read_in_part = {file for part, summary in parts if not summary for file in part.files}
    unread = touched & (read_in_part | broken)
    while mixed := [n for n, part in done.items() if part.files & unread]:
        for number in mixed:
            summary_path(plan.folder, number).unlink()
            unread |= touched & done.pop(number).files
    return unread
