"""Headers are those of tarfile."""

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
    shard=st.integers(0, 2_000_000),
    first=st.integers(0, CHUNKS - 5),
)
def test_headers_are_those_of_tarfile(
    payload: int, token_bytes: int, shard: int, first: int
) -> None:
    made = Headers(payload, CHUNKS, token_bytes).of(shard, first, 5)
    assert made.shape == (5, TAR_BLOCK)
    for n, header in enumerate(made):
        member = tarfile.TarInfo(member_name(shard, first + n, token_bytes))
        member.size, member.mode = payload, 0o444
        assert header.tobytes() == member.tobuf(tarfile.USTAR_FORMAT)
