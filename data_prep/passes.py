"""The two passes over the documents: spill them into runs, then count and pack the runs' ranges."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.merge import Layout, MergeTask, merged
from data_prep.packing import SplitPlan
from data_prep.ranges import CountTask, Partition, count_all, useful_workers
from data_prep.shuffle import HASH_END, PartSummary, Spiller, summary_path
from data_prep.sources import Part
from data_prep.workers import Report, run_jobs
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError


@dataclass(frozen=True)
class SpillPlan:
    """What pass 1 is to do."""

    parts: Sequence[Part]
    tokenizer: Path
    folder: Path
    seed: int


@dataclass(frozen=True)
class SpillTask:
    """Spills parts, each given with its number."""

    tokenizer: Path
    folder: Path
    seed: int

    def start(self, report: Report) -> Callable[[tuple[int, Part]], None]:
        """A function that spills a part."""
        tokenizer = Tokenizer.load(self.tokenizer)
        spiller = Spiller(tokenizer, self.folder, self.seed, lambda tokens: report(0, tokens))

        def spill(job: tuple[int, Part]) -> None:
            number, part = job
            spiller.spill(part, number)
            report(1, 0)

        return spill


def spill_all(plan: SpillPlan, workers: int, report: Report) -> list[PartSummary]:
    """Spill the parts that are not finished yet; returns the summaries of all parts."""
    todo = [(n, plan.parts[n]) for n, summary in enumerate(finished(plan)) if not summary]
    report(len(plan.parts) - len(todo), 0)
    run_jobs(SpillTask(plan.tokenizer, plan.folder, plan.seed), todo, workers, report)
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


def framed_tokens(summaries: Sequence[PartSummary]) -> int:
    """Tokens of all documents with <BOS> and <EOS>."""
    return sum(summary.tokens + 2 * summary.documents for summary in summaries)


def merge_runs(
    summaries: Sequence[PartSummary], runs: Path, merged_runs: Path, workers: int, report: Report
) -> list[Partition]:
    """Merge the runs if they are too many; returns the partitions. `report` counts groups.

    Args:
        runs: the folder of the runs.
        merged_runs: the folder for merged ones.
    """
    paths = [runs / name for summary in summaries for name in summary.runs]
    tokens = framed_tokens(summaries)
    layout = Layout.of(tokens, len(paths))
    digest = hashlib.sha256(f"{layout}\n".encode())
    _add_summaries(digest, summaries)
    task = MergeTask(layout, merged_runs, digest.hexdigest())
    return merged(task, paths, useful_workers(tokens, workers), report)


def count_splits(
    partitions: Sequence[Partition],
    tokens: int,
    splits: Mapping[str, range],
    workers: int,
    report: Report,
) -> list[SplitPlan]:
    """Count what each range of keys holds of each split; `report` counts runs.

    Args:
        tokens: tokens of all partitions.
        splits: the range of split hashes of each split.
    """
    task = CountTask(partitions[-1].ranges.stop, tuple(splits.values()))
    counts = count_all(task, partitions, useful_workers(tokens, workers), report)
    return [SplitPlan(*item, found) for item, found in zip(splits.items(), counts, strict=True)]


def plan_digest(
    settings: str, tokenizer: str, splits: Sequence[SplitPlan], summaries: Sequence[PartSummary]
) -> str:
    """SHA-256 of all that decides the bytes of packed ranges, and of where ranges begin."""
    digest = hashlib.sha256(f"{settings}\n{tokenizer}\n".encode())
    for split in splits:
        digest.update(f"{split.name} {split.hashes}\n".encode())
        digest.update(split.counts.tokens.tobytes() + split.counts.documents.tobytes())
    _add_summaries(digest, summaries)
    return digest.hexdigest()


def _add_summaries(digest: "hashlib._Hash", summaries: Sequence[PartSummary]) -> None:
    for summary in summaries:
        digest.update(summary.model_dump_json().encode())
