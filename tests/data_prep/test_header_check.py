"""Headers of members are compared as they are made, for any number of a shard and of a chunk."""

import numpy as np
import pytest

from data_prep.checks import header_check
from data_prep.checks.header_check import HeaderCheck
from i3dist.data.archive import Headers

CHUNKS = 300


def wrong(check: HeaderCheck, stored: np.ndarray, first: int) -> list[int]:
    """Which of the chunks from `first` on have another header than `stored`, [N, 512]."""
    left = stored.copy()
    check.subtract(HeaderCheck.columns(left), first)
    return (np.flatnonzero((left != check.rest).any(axis=1)) + first).tolist()


@pytest.mark.parametrize("kept", [header_check._KEPT_SUMS, 0])
def test_every_changed_byte_is_found(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_check, "_KEPT_SUMS", kept)
    monkeypatch.setattr(header_check, "_ROWS", 64)
    headers, random = Headers(1024, CHUNKS), np.random.default_rng(0)
    check = HeaderCheck(headers, CHUNKS)
    for number in (0, 7, 70, 999_999, 1_000_000, 3_999_999, 123_456, 1_000_000, 0):
        stored = headers.of(number, 0, CHUNKS)
        check.begin(number)
        first = int(random.integers(CHUNKS))
        assert wrong(check, stored[first:], first) == []
        assert wrong(check, stored, 0) == []
        changed = stored.copy()
        rows = np.sort(random.choice(CHUNKS, 40, replace=False))
        changed[rows, random.integers(512, size=40)] ^= random.integers(1, 256, 40, np.uint8)
        assert wrong(check, changed, 0) == rows.tolist()
        assert len(wrong(check, stored[:-1], 1)) == CHUNKS - 1, "each is that of its own chunk"
        alike = stored.copy()
        alike[:, random.integers(512)] += 1
        assert len(wrong(check, alike, 0)) == CHUNKS, "though all are changed alike"
        check.begin(number + 1)
        assert len(wrong(check, stored, 0)) == CHUNKS, "and of its own shard"
