"""Headers are those of tarfile, whatever shards they were made for before."""

import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3dist.data.archive import Headers
from i3dist.data.manifest import TAR_BLOCK, member_name

CHUNKS = 300


@pytest.mark.parametrize("payload", [4, 1024, 131_072])
@pytest.mark.parametrize("token_bytes", [2, 4])
@given(
    shards=st.lists(st.integers(0, 2_000_000), min_size=1, max_size=4),
    first=st.integers(0, CHUNKS - 5),
)
def test_headers_are_those_of_tarfile(
    payload: int, token_bytes: int, shards: list[int], first: int
) -> None:
    headers = Headers(payload, CHUNKS, token_bytes)
    blank = headers.blank(5)
    for shard in shards:
        made = headers.number(blank, shard, first)
        assert made.shape == (5, TAR_BLOCK)
        for n, header in enumerate(made):
            member = tarfile.TarInfo(member_name(shard, first + n, token_bytes))
            member.size, member.mode = payload, 0o444
            assert header.tobytes() == member.tobuf(tarfile.USTAR_FORMAT)
