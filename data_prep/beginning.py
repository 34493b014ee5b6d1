"""Begins an output: finds out what it is made from, compares, and writes it down."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.console import Console

from data_prep.arguments import ALONE, TaskShare
from data_prep.begun import Begun
from data_prep.choice import Choice
from data_prep.evidence import Evidence, Piece
from data_prep.forecast import FORECAST_BYTES, Forecast, measure
from data_prep.formats import FORMATS
from data_prep.output import Output
from data_prep.output_settings import OTHER_CONTENT, OutputSettings
from data_prep.passes import SpillPlan, finished, forget_parts_of
from data_prep.plan import Plan
from data_prep.shuffle import PartSummary
from data_prep.sources import Part, Source
from data_prep.tokenizer import sample_texts, train_tokenizer
from i3dist.data.manifest import MAX_SHARDS
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.files import regular


@dataclass(frozen=True)
class Beginning:
    """What an output is made from: settings, source, and the tokenizer if one is `given`.

    `share` is that of a task.
    """

    settings: OutputSettings
    output: Output
    source: Source
    given: Tokenizer | None
    console: Console
    share: TaskShare = ALONE

    def is_complete(self) -> bool:
        """Whether the output is complete.

        Raises:
            UserError: it was made from something else.
        """
        if not self.output.is_complete(self.settings, self._begun.may_differ(self.given)):
            return False
        if self.evidence(()) and not self.output.evidence():
            raise UserError(
                f"{self.output.folder} does not say what it was made from (source.json is "
                "missing): delete it and make it again"
            )
        self._touched(tuple)
        return True

    def plan(self, *, with_broken: bool) -> SpillPlan:
        """What pass 1 is to do, with the parts that the work was begun with.

        Broken files are an error, or `with_broken` some are left to the tasks that read them.
        """
        has_tokenizer = self.given or self.output.tokenizer.exists()
        if with_broken and has_tokenizer:  # training it needs all files
            self.source.keep_in(self.output.facts, self.share)
            parts = self.source.parts_with_broken()
        else:
            parts = self._whole_parts
        output, former = self.output, Plan.load(self.output.plan)
        return SpillPlan(
            former.arranged(parts) if former else parts,
            output.tokenizer,
            output.runs,
            self.settings.seed,
            self.settings.format,
            self._choice,
        )

    @cached_property
    def _whole_parts(self) -> Sequence[Part]:
        """The parts of a source that can be opened as a whole."""
        self.source.keep_in(self.output.facts, self.share)
        return self.source.parts()

    def begin(self, plan: SpillPlan, workers: int | None = None) -> None:
        """Write down what the output is made from, and show what so many workers will make."""
        unread = self._touched(lambda: pieces_of(finished(plan)))
        if unread:
            unread = forget_parts_of(plan, unread, self._begun.broken())
        tokenizer = self._tokenizer(is_certain=not unread)
        free = self._begun.may_differ(self.given)
        self.output.begin(self.settings, tokenizer, self.evidence(()), free)
        Plan.of(plan.parts).write(self.output.plan)
        trained = Tokenizer.load(self.output.tokenizer)
        say(self.console, str(trained.encoder))
        is_large = sum(part.size for part in plan.parts) >= FORECAST_BYTES
        if workers and is_large and not any(finished(plan)):
            self._forecast(plan.parts, trained, workers, 1)

    def foresee(self, workers: int, nodes: int) -> None:
        """Show what a run would make on so many nodes, and make nothing."""
        path = self.output.tokenizer
        tokenizer = self.given or (Tokenizer.load(path) if path.exists() else None)
        self._forecast(self.source.parts(), tokenizer, workers, nodes)

    def _forecast(
        self, parts: Sequence[Part], tokenizer: Tokenizer | None, workers: int, nodes: int
    ) -> None:
        """Show what will be made, and refuse what cannot be."""
        with self.console.status("measuring a sample of the source"):
            sample = measure(parts, tokenizer, FORMATS[self.settings.format], self._choice)
        if sample is None:
            unknown = "the size of this source is not known beforehand"
            rare = ", or no row of a sample meets --where" if self.settings.where else ""
            self.console.print(f"no estimate: {unknown}{rare}", soft_wrap=True)
            return
        forecast = Forecast.of(sample, self.settings, workers, nodes)
        free = self.output.free_bytes()
        for line in forecast.lines(self.output.folder, free):
            say(self.console, line)
        forecast.check(self.output.folder, free, MAX_SHARDS)

    def evidence(self, pieces: Sequence[Piece]) -> Evidence | None:
        """What tells whether the source is still the same; None where its revision tells that."""
        if self.settings.has_content_digest or not self.source.files:
            return None
        return Evidence(states=self.source.states, pieces=tuple(pieces))

    def _touched(self, read: Callable[[], Iterable[Piece]]) -> frozenset[int]:
        """Numbers of the files whose times have changed since the work began.

        Raises:
            UserError: such a file has other content where one of the pieces `read`, or of the
                finished output's pieces, was read.
        """
        if touched := self._begun.touched():
            with self.console.status("comparing the source with what was read"):
                self._begun.check(touched, read())
        return touched

    def _tokenizer(self, is_certain: bool) -> bytes:
        """The tokenizer's file. One of an earlier run is trained again unless it `is_certain`."""
        path = self.output.tokenizer
        former = regular(path).read_bytes() if path.exists() else None
        if former and (self.given or is_certain):
            return former
        if self.given:
            return self.given.data
        texts = sample_texts(
            self.source.sample_parts(self._whole_parts),
            self.settings.source,
            self.settings.tokenizer_sample_mb,
            evenly=self.settings.tokenizer_sample == "even",
            documents=FORMATS[self.settings.format],
        )
        with self.console.status("training the tokenizer"):
            data = train_tokenizer(texts, self.settings.vocab_size)
        if former and data != former:
            refusal = self.output.refusal(OTHER_CONTENT)
            raise UserError(f"{refusal}, or keep its tokenizer: --tokenizer {path}")
        return data

    @property
    def _begun(self) -> Begun:
        return Begun(self.output, self.source)

    @property
    def _choice(self) -> Choice:
        settings = self.settings
        return Choice(settings.min_tokens, settings.max_tokens, bool(settings.deduplicate))


def pieces_of(summaries: Iterable[PartSummary | None]) -> list[Piece]:
    """The pieces of files that finished parts were made of."""
    return [piece for summary in summaries if summary for piece in summary.pieces]


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
