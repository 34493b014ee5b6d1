"""What an output was begun from, compared with what its source is now."""

from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.evidence import Piece
from data_prep.output import Output
from data_prep.output_settings import OTHER_CONTENT, OutputSettings
from data_prep.passes import failures
from data_prep.reading.readers import naming
from data_prep.reading.validation import PairOfSources
from data_prep.sources import Source
from i3dist.data.tokenizer import Tokenizer
from i3dist.files import regular


@dataclass(frozen=True)
class Begun:
    """An output that may be begun already, and the source that it is to be made from."""

    output: Output
    source: Source

    def may_differ(self, given: Tokenizer | None) -> set[str]:
        """Settings that may differ from those that the work was begun with.

        Broken files may have been repaired, and the tokenizer that was trained may be given now.
        """
        former, path = self.output.settings(), self.output.tokenizer
        free = set()
        if former and self._is_repaired(former):
            free |= {"revision", "valid_revision"}
        is_trained = former and former.tokenizer == "trained" and path.exists()
        if given and is_trained and given.data == regular(path).read_bytes():
            free |= {"tokenizer", "tokenizer_sample_mb", "vocab_size"}
        return free

    def _is_repaired(self, former: OutputSettings) -> bool:
        """Whether only broken files have other sizes than when these settings were written."""
        evidence = self.output.evidence()
        if not evidence or len(evidence.states) != len(self.source.files):
            return False
        states = evidence.states
        pairs = enumerate(zip(states, self.source.states, strict=True))
        resized = {number for number, (then, now) in pairs if then[0] != now[0]}
        is_same = self.source.outline_at(states) == former.revision
        if isinstance(self.source, PairOfSources):
            is_same &= self.source.validation_at(states) == former.valid_revision
        return is_same and resized <= self.broken()

    def broken(self) -> frozenset[int]:
        """Numbers of the files of parts that could not be read."""
        return frozenset(n for failure in failures(self.output.runs) for n in failure.files)

    def touched(self) -> frozenset[int]:
        """Numbers of the files whose times have changed since the work began."""
        evidence = self.output.evidence()
        return evidence.touched(self.source.states) if evidence else frozenset()

    def check(self, touched: frozenset[int], pieces: Iterable[Piece]) -> None:
        """Read touched files again where one of `pieces`, or of a finished output's, was read.

        Broken files are not compared, because they are tokenized again as a whole.

        Raises:
            UserError: a file has other content there.
        """
        evidence = self.output.evidence()
        touched -= self.broken()
        for piece in (*(evidence.pieces if evidence else ()), *pieces):
            path, _ = self.source.files[piece.file]
            with naming(path):
                is_same = piece.file not in touched or piece.is_in(path)
            if not is_same:
                raise self.output.refusal(f"before {path} changed, {OTHER_CONTENT}")
