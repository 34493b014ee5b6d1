"""FineWeb-Edu, streamed from the Hugging Face hub: nothing is downloaded as a whole."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_prep.sources import SOURCES, Part, Record, Skip, Source
from data_prep.where import Where
from i3dist.cli.paths import as_unicode
from i3dist.errors import UserError

DATASET = "HuggingFaceFW/fineweb-edu"
CONFIG = "sample-10BT"
HUB_NAME = f"{DATASET} {CONFIG}"
_TIMEOUT_S = 15.0
_ROWS_AT_A_TIME = 128


@dataclass(frozen=True)
class HubPart(Part):
    """One of the dataset's `of` files, at one revision."""

    revision: str
    number: int
    of: int
    where: Where | None = None

    def records(self) -> Iterator[Record]:
        """Stream the documents in order."""
        with _network():
            dataset = _stream(self.revision)
            used = self.where.columns(dataset.column_names) if self.where else []
            dataset = dataset.select_columns(list(dict.fromkeys(["text", "id", "url", *used])))
            dataset = dataset.shard(num_shards=self.of, index=self.number)
            rows = self._chosen(dataset, used) if self.where else ((row, True) for row in dataset)
            for row, (fields, is_kept) in enumerate(rows):
                position = f"{CONFIG}/{self.number:05d}#{row}"
                identifier, url = (as_unicode(fields.get(k) or position) for k in ("id", "url"))
                yield Record(position, identifier, url, fields["text"] if is_kept else Skip.WHERE)

    def _chosen(self, dataset: Any, used: Sequence[str]) -> Iterator[tuple[dict[str, Any], bool]]:
        """All rows, and whether they are kept."""
        assert self.where
        for table in dataset.with_format("arrow").iter(batch_size=_ROWS_AT_A_TIME):
            kept = self.where.kept(table.select(used), HUB_NAME)
            yield from zip(table.to_pylist(), kept.tolist(), strict=True)


@SOURCES.register(DATASET)
class HubSource(Source):
    """The dataset at one commit. A run that continues keeps the commit that it began with."""

    name = HUB_NAME
    where: Where | None = None

    @cached_property
    def revision(self) -> str:
        """The commit to read: the newest unless one is pinned."""
        with _network():
            return _check_reachable(None)

    @property
    def license(self) -> str | None:
        """The license in the dataset's card, at the commit that is read; None if it names none."""
        return _license(self.revision)

    def chosen(self, where: str) -> "HubSource":
        """The source without the rows of which the expression `where` is not true."""
        self.where = Where.parse(where)
        return self

    def pin(self, revision: str) -> None:
        """Read this commit."""
        self.revision = revision

    def parts(self) -> Sequence[HubPart]:
        """One part per file of the dataset."""
        with _network():
            _check_reachable(self.revision)
            dataset = _stream(self.revision)
            if self.where:
                self.where.check(dataset.features.arrow_schema, HUB_NAME)
            files = dataset.num_shards
        return [HubPart(self.revision, number, files, self.where) for number in range(files)]


def _stream(revision: str) -> Any:
    from datasets import load_dataset

    return load_dataset(DATASET, CONFIG, split="train", streaming=True, revision=revision)


def _check_reachable(revision: str | None) -> str:
    """Ask the hub for the dataset once, without retries; returns the commit."""
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(DATASET, revision=revision, timeout=_TIMEOUT_S).sha)


def _license(revision: str) -> str | None:
    from huggingface_hub import HfApi

    with suppress(Exception):  # the data can be read without it
        card = HfApi().dataset_info(DATASET, revision=revision, timeout=_TIMEOUT_S).card_data
        found = card.get("license") if card else None
        return ", ".join(found) if isinstance(found, list) else found
    return None


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
