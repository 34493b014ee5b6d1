"""The two passes over the documents: spill them (in parallel), then pack them in order."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from data_prep.pack import Packer
from data_prep.shuffle import HASH_END, PartSummary, Spiller, in_order, summary_path
from data_prep.sources import Part
from i3dist.cli.extend import LOADED, load_extension
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError

_POLL_S = 0.25
_spiller: Spiller | None = None

Report = Callable[[int, int], None]
"""Called with the number of (units, tokens) done since the last call."""


@dataclass(frozen=True)
class SpillPlan:
    """What pass 1 is to do."""

    parts: Sequence[Part]
    tokenizer: Path
    folder: Path
    seed: int

    def spiller(self, report: Callable[[int], None]) -> Spiller:
        """A spiller of these parts; `report` is called with numbers of tokens."""
        return Spiller(Tokenizer.load(self.tokenizer), self.folder, self.seed, report)


def spill_all(plan: SpillPlan, workers: int, report: Report) -> list[PartSummary]:
    """Spill the parts that are not finished yet; returns the summaries of all parts."""
    todo = [number for number, summary in enumerate(finished(plan)) if not summary]
    report(len(plan.parts) - len(todo), 0)
    spill = _spill_here if min(workers, len(todo)) <= 1 else _spill_in_processes
    spill(plan, todo, workers, report)
    return [summary for summary in finished(plan) if summary]


def finished(plan: SpillPlan) -> list[PartSummary | None]:
    """The summary of each part; None if the part is not finished."""
    summaries: list[PartSummary | None] = []
    for number, part in enumerate(plan.parts):
        summary = PartSummary.load(summary_path(plan.folder, number))
        summaries.append(summary if summary and part.is_made_of(summary.pieces) else None)
    return summaries


def forget_parts_of(plan: SpillPlan, touched: frozenset[int]) -> frozenset[int]:
    """Forget the parts of touched files that were read only in part, so that all is read again.

    Returns the touched files that are to be read.
    """
    parts = list(zip(plan.parts, finished(plan), strict=True))
    done = {number: part for number, (part, summary) in enumerate(parts) if summary}
    unread = touched & {file for part, summary in parts if not summary for file in part.files}
    while mixed := [n for n, part in done.items() if part.files & unread]:
        for number in mixed:
            summary_path(plan.folder, number).unlink()
            unread |= touched & done.pop(number).files
    return unread


def _spill_here(plan: SpillPlan, todo: Sequence[int], workers: int, report: Report) -> None:
    spiller = plan.spiller(lambda tokens: report(0, tokens))
    for number in todo:
        spiller.spill(plan.parts[number], number)
        report(1, 0)


def _spill_in_processes(plan: SpillPlan, todo: Sequence[int], workers: int, report: Report) -> None:
    # Spawned, not forked: the parent has threads (progress bar, Arrow) that a fork would not copy.
    context = multiprocessing.get_context("spawn")
    tokens = context.Value("Q", 0)
    setup = (replace(plan, parts=()), tuple(LOADED), tokens)
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, setup)
    seen = 0
    try:
        pending = {pool.submit(_spill, plan.parts[number], number) for number in todo}
        while pending:
            finished, pending = wait(pending, _POLL_S, FIRST_COMPLETED)
            for future in finished:
                future.result()
            now = tokens.value
            report(len(finished), now - seen)
            seen = now
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?): run the same command again with "
            "fewer --workers, and it continues"
        ) from None
    finally:
        # After a failure do not wait for the running parts: the workers end with this process.
        pool.shutdown(wait=sys.exc_info()[0] is None, cancel_futures=True)


def _start_worker(plan: SpillPlan, extensions: Sequence[Path], tokens: "Synchronized[int]") -> None:
    global _spiller
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for path in extensions:  # before the parts arrive, whose classes may be in these files
        load_extension(path)

    def count(more: int) -> None:
        with tokens.get_lock():
            tokens.value += more

    _spiller = plan.spiller(count)


def _end_with_parent() -> None:
    """End this worker when its parent has died, even by SIGKILL. It would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _spill(part: Part, number: int) -> None:
    assert _spiller is not None
    _spiller.spill(part, number)


def split_ranges(summaries: Sequence[PartSummary], valid_fraction: float) -> tuple[range, range]:
    """The ranges of split hashes of (train, valid), each of which gets a document.

    The smallest hash is always in valid and the largest in train, whatever the fraction.

    Raises:
        UserError: the corpus has only one text, which cannot be split.
    """
    if not valid_fraction:
        return range(HASH_END), range(0)
    smallest = min(summary.smallest_split for summary in summaries)
    largest = max(summary.largest_split for summary in summaries)
    if smallest == largest:
        raise UserError(
            "a validation split needs two different documents and the source has one: "
            "give it more and another --out, or set --valid-fraction 0"
        )
    bound = min(max(int(valid_fraction * HASH_END), smallest + 1), largest)
    return range(bound, HASH_END), range(bound)


def pack_split(
    summaries: Sequence[PartSummary], runs: Path, splits: range, packer: Packer, report: Report
) -> None:
    """Pass 2 for one split: pack its documents in the order of their keys."""
    paths = [runs / name for summary in summaries for name in summary.runs]
    total = sum(summary.tokens for summary in summaries)
    for identifier, url, tokens in in_order(paths, total, splits):
        packer.add(identifier, url, tokens)
        report(1, len(tokens))
    packer.close()
