"""FineWeb-Edu, streamed from the Hugging Face hub: nothing is downloaded as a whole."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_prep.sources import SOURCES, Part, Record, Source
from i3dist.cli.paths import as_unicode
from i3dist.errors import UserError

DATASET = "HuggingFaceFW/fineweb-edu"
CONFIG = "sample-10BT"
HUB_NAME = f"{DATASET} {CONFIG}"
_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class HubPart(Part):
    """One of the dataset's `of` files, at one revision."""

    revision: str
    number: int
    of: int

    def records(self) -> Iterator[Record]:
        """Stream the documents in order."""
        with _network():
            dataset = _stream(self.revision).select_columns(["text", "id", "url"])
            dataset = dataset.shard(num_shards=self.of, index=self.number)
            for row, fields in enumerate(dataset):
                position = f"{CONFIG}/{self.number:05d}#{row}"
                identifier, url = (as_unicode(fields.get(k) or position) for k in ("id", "url"))
                yield Record(position, identifier, url, fields["text"])


@SOURCES.register(DATASET)
class HubSource(Source):
    """The dataset at one commit. A run that continues keeps the commit that it began with."""

    name = HUB_NAME

    @cached_property
    def revision(self) -> str:
        """The commit to read: the newest unless one is pinned."""
        with _network():
            return _check_reachable(None)

    def pin(self, revision: str) -> None:
        """Read this commit."""
        self.revision = revision

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
