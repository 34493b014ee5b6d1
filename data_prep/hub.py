"""FineWeb-Edu from the Hugging Face hub, streamed: nothing is downloaded as a whole."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_prep.evidence import Piece, State
from data_prep.listing import NamedFile
from data_prep.records import Record, clean_name
from i3dist.errors import UserError

DATASET = "HuggingFaceFW/fineweb-edu"
CONFIG = "sample-10BT"
HUB_NAME = f"{DATASET} {CONFIG}"
_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class HubPart:
    """One of the dataset's `of` files, at one revision."""

    revision: str
    number: int
    of: int

    def records(self) -> Generator[Record, None, None]:
        """Stream the documents in order."""
        with _network():
            dataset = _stream(self.revision).select_columns(["text", "id", "url"])
            dataset = dataset.shard(num_shards=self.of, index=self.number)
            for row, fields in enumerate(dataset):
                position = f"{CONFIG}/{self.number:05d}#{row}"
                identifier, url = (clean_name(fields.get(k) or position) for k in ("id", "url"))
                yield Record(position, identifier, url, fields["text"])

    @property
    def files(self) -> frozenset[int]:
        """None that could change."""
        return frozenset()

    def is_made_of(self, pieces: Sequence[Piece]) -> bool:
        """Always: it is at a fixed revision."""
        return True


class HubSource:
    """The dataset at a revision: the one that a former run has pinned, else the newest."""

    name = HUB_NAME
    files: Sequence[NamedFile] = ()
    states: tuple[State, ...] = ()
    left_out = ""

    def __init__(self, pinned: str | None = None) -> None:
        self._pinned = pinned

    @property
    def outline(self) -> str:
        """The commit to read: it tells the content."""
        return self.revision

    @cached_property
    def revision(self) -> str:
        """The commit to read, so that a run that is continued never mixes two versions."""
        if self._pinned:
            return self._pinned
        with _network():
            return _check_reachable(None)

    def parts(self) -> Sequence[HubPart]:
        """One part per file of the dataset."""
        with _network():
            _check_reachable(self.revision)
            files = _stream(self.revision).num_shards
        return [HubPart(self.revision, number, files) for number in range(files)]


def _stream(revision: str) -> Any:
    from datasets import load_dataset

    return load_dataset(DATASET, CONFIG, split="train", streaming=True, revision=revision)


def _check_reachable(revision: str | None) -> str:
    """Ask the hub for the dataset once, without retries; returns the commit."""
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(DATASET, revision=revision, timeout=_TIMEOUT_S).sha)


@contextmanager
def _network() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries below raise dozens of kinds, some of them bare
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(
            f"cannot read {HUB_NAME} from the hub ({reason}): run this again with a network, "
            "or name text of your own with --source (`--source stdlib` is always there)"
        ) from None
