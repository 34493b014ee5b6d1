"""Datasets of the Hugging Face hub, read in place: nothing is downloaded as a whole.

The library `datasets` tells which files a configuration has. They are read as files at URLs.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from itertools import groupby

from data_prep.reading.readers import SUFFIXES, TEXT
from data_prep.reading.remote import RemoteFile, RemotePart, file_of, remote_parts, url_source
from data_prep.reading.where import Where
from data_prep.retries import is_final, retried, why
from data_prep.sources import SOURCES, Part, Source
from i3dist.errors import UserError

DATASET = "HuggingFaceFW/fineweb-edu"
CONFIG = "sample-10BT"
HUB_NAME = f"{DATASET} {CONFIG}"
CONFIGS = (CONFIG, "sample-100BT", "sample-350BT", "default")
"""Of FineWeb-Edu: three samples, and all of it."""

_TIMEOUT_S = 15.0
_URL = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/([^/*]+))?/?")


class HubSource(Source):
    """A configuration of a dataset, at one commit.

    A run that continues keeps the commit that it began with.
    """

    where: Where | None = None

    def __init__(
        self,
        dataset: str = DATASET,
        config: str | None = CONFIG,
        at: str | None = None,
        column: str = TEXT,
    ) -> None:
        self.dataset, self.config, self.at, self.column = dataset, config, at, column
        self.name = " ".join(filter(None, (dataset, config, at and f"at {at}")))
        if column != TEXT:
            self.name += f", column {column}"

    @cached_property
    def revision(self) -> str:
        """The commit to read: the newest unless one is pinned."""
        with self._network():
            return _commit(self.dataset, self.at)

    @property
    def license(self) -> str | None:
        """The license in the dataset's card, at the commit that is read; None if it names none."""
        return _license(self.dataset, self.revision)

    def chosen(self, where: str) -> "HubSource":
        """The source without the rows of which the expression `where` is not true."""
        self.where = Where.parse(where)
        return self

    def pin(self, revision: str) -> None:
        """Read this commit."""
        self.revision = revision

    def parts(self) -> Sequence[RemotePart]:
        """Parts of about equal size, each of some row groups."""
        with self._network():
            _commit(self.dataset, self.revision)
            urls = retried(lambda: _data_files(self.dataset, self.config, self.revision), self.name)
            sizes = retried(lambda: _sizes(urls), self.name)
        folder = self.config or "default"
        files = [
            RemoteFile(
                f"{folder}/{number:05d}", number, url, url, size, column=self.column,
                where=self.where,
            )
            for number, (url, size) in enumerate(zip(urls, sizes, strict=True))
        ]  # fmt: skip
        return remote_parts(files, self.revision)

    def sample_parts(self, parts: Sequence[Part]) -> Sequence[Part]:
        """A part for each file: a sample reads their beginnings."""
        spans = [span for part in parts if isinstance(part, RemotePart) for span in part.spans]
        return [RemotePart(tuple(own), self.revision) for _, own in groupby(spans, file_of)]

    def with_text_column(self, column: str) -> "HubSource":
        """The source with another column, or key, as its text."""
        return HubSource(self.dataset, self.config, self.at, column)

    @contextmanager
    def _network(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the libraries below raise dozens of kinds, some of them bare
            raise UserError(
                f"cannot read {self.name} from the hub ({why(error)}): run this again with a "
                "network, or name text of your own with --source (`--source stdlib` is always "
                "there)"
            ) from None


SOURCES.register(DATASET)(HubSource)
for _config in CONFIGS:
    SOURCES.register(f"{DATASET}/{_config}")(partial(HubSource, DATASET, _config))


def source_at(url: str) -> Source:
    """The source at a URL: hf://datasets/OWNER/NAME[@COMMIT][/CONFIG], or files."""
    found = _URL.fullmatch(url)
    if found is None or (found[3] or "").lower().endswith(SUFFIXES):
        return url_source(url)
    return HubSource(found[1], found[3], found[2])


def _commit(dataset: str, at: str | None) -> str:
    """Ask the hub for a dataset; returns the commit. An answer is asked for once."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def ask() -> str:
        return str(HfApi().dataset_info(dataset, revision=at, timeout=_TIMEOUT_S).sha)

    try:
        return ask()
    except HfHubHTTPError as error:
        if is_final(error):
            raise
        return retried(ask, dataset)


def _license(dataset: str, revision: str) -> str | None:
    from huggingface_hub import HfApi

    with suppress(Exception):  # the data can be read without it
        card = HfApi().dataset_info(dataset, revision=revision, timeout=_TIMEOUT_S).card_data
        found = card.get("license") if card else None
        return ", ".join(found) if isinstance(found, list) else found
    return None


def _data_files(dataset: str, config: str | None, revision: str) -> list[str]:
    """The URLs of the files of a configuration's training split."""
    from datasets import load_dataset_builder

    files = load_dataset_builder(dataset, config, revision=revision).config.data_files or {}
    if "train" in files:
        return list(files["train"])
    if len(files) == 1:
        return list(next(iter(files.values())))
    raise UserError(
        f"{dataset} {config or ''} has no split train, but {', '.join(files) or 'no files'}: name "
        f"its files with --source hf://datasets/{dataset}/..."
    )


def _sizes(urls: Sequence[str]) -> list[int]:
    from huggingface_hub import HfFileSystem

    filesystem = HfFileSystem()
    return [int(filesystem.info(url)["size"]) for url in urls]
