"""Manifests of millions of shards, and the fast reading that they need.

`Manifest.load` compares a file with what `Manifest.write` makes. Its oracle is pydantic alone.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from i3dist.data.archive import shard_bytes
from i3dist.data.manifest import MANIFEST_NAME, MAX_SHARDS, Manifest, archive_size, member_name
from i3dist.data.schedule import permutation
from i3dist.data.shard_table import Shape, ShardTable, shard_name, shard_number
from i3dist.errors import UserError
from tests.data.test_manifest import manifests
from tests.test_imports import ROOT

here = settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SEVEN_DIGITS = 1_000_000


def large(shards: int, per_shard: int = 3, length: int = 4, last: int = 2) -> Manifest:
    """A manifest of many shards, whose hashes differ."""
    chunks = (shards - 1) * per_shard + last
    hashes = np.arange(shards * 32, dtype=np.uint32).reshape(shards, 32) * 2_654_435_761 >> 24
    full, end = (Shape(count, archive_size(count, length)) for count in (per_shard, last))
    return Manifest(
        split="train",
        chunk_length=length,
        chunks_per_shard=per_shard,
        vocab_size=16,
        tokenizer_sha256="a" * 64,
        bos_id=2,
        eos_id=3,
        pad_id=1,
        source='a "shards": [ b',
        seed=0,
        documents=1,
        tokens=chunks * length,
        chunks=chunks,
        shards=ShardTable(hashes.astype(np.uint8), full, end),
    )


def by_pydantic(text: bytes) -> Manifest | None:
    """What pydantic alone reads; None if it refuses."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError:
        return None


def naive_fingerprint(manifest: Manifest) -> str:
    """As docs/data-format.md gives it."""
    text = json.dumps(manifest.model_dump(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def agrees(folder: Path, text: bytes) -> bool:
    """Whether a text is a manifest; what is read of it must be what pydantic reads."""
    (folder / MANIFEST_NAME).write_bytes(text)
    expected = by_pydantic(text)
    if expected is None:
        with pytest.raises(UserError, match=MANIFEST_NAME):
            Manifest.load(folder)
        return False
    found = Manifest.load(folder)
    assert found == expected and expected == found
    assert found.model_dump() == expected.model_dump()
    assert found.fingerprint == naive_fingerprint(expected)
    assert found.shard_chunks == tuple(shard.chunks for shard in expected.shards)
    assert found.shard_sizes.tolist() == [shard.size for shard in expected.shards]
    return True


@here
@given(manifests())
def test_what_is_written_is_read_as_a_table(tmp_path: Path, manifest: Manifest) -> None:
    manifest.write(tmp_path)
    text = (tmp_path / MANIFEST_NAME).read_bytes()
    assert text == manifest.model_dump_json(indent=1).encode() + b"\n"
    assert agrees(tmp_path, text)
    found = Manifest.load(tmp_path)
    assert isinstance(found.shards, ShardTable)
    found.write(tmp_path)
    assert (tmp_path / MANIFEST_NAME).read_bytes() == text


@here
@given(manifests(), st.data())
def test_a_mutated_manifest_is_taken_or_refused_as_by_pydantic(
    tmp_path: Path, manifest: Manifest, data: st.DataObject
) -> None:
    text = bytearray(manifest.model_dump_json(indent=1).encode() + b"\n")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        cut = data.draw(st.integers(0, 2))
        text[at : at + cut] = data.draw(
            st.sampled_from(
                [b"", b"0", b"1", b"9", b"a", b"F", b" ", b",", b"\n", b'"', b"}", b"]"]
            )
        )
    agrees(tmp_path, bytes(text))


@here
@given(manifests(), st.data())
def test_a_manifest_with_other_values_is_taken_or_refused_as_by_pydantic(
    tmp_path: Path, manifest: Manifest, data: st.DataObject
) -> None:
    """Written as our own are, so that only a value here and there is another."""
    content = manifest.model_dump()
    shards = [dict(shard) for shard in content["shards"]]
    target = data.draw(st.sampled_from([content, *shards]))
    key = data.draw(st.sampled_from(sorted(set(target) - {"shards"})))
    value = target[key]
    others = [value, str(value), f"{value}0", 0, 1, True, None, 1.0, -1, 1 << 70]
    others += [value + 1, value - 1, value * 10] if isinstance(value, int) else [value.upper()]
    target[key] = data.draw(st.sampled_from(others))
    content["shards"] = data.draw(
        st.sampled_from([shards, shards[1:], shards[:-1], shards[::-1], [*shards, shards[-1]]])
    )
    agrees(tmp_path, json.dumps(content, indent=1).encode() + b"\n")


@pytest.mark.parametrize("shards", [1, 2, 65_535, 65_536, 65_537])
def test_a_table_of_several_blocks_equals_its_shards(tmp_path: Path, shards: int) -> None:
    manifest = large(shards)
    manifest.write(tmp_path)
    assert agrees(tmp_path, (tmp_path / MANIFEST_NAME).read_bytes())
    assert manifest.shards[-1] == tuple(manifest.shards)[-1]
    assert manifest.shards[:2] == tuple(manifest.shards)[:2]
    with pytest.raises(IndexError):
        manifest.shards[shards]


def test_names_have_seven_digits_from_a_million_on(tmp_path: Path) -> None:
    manifest = large(SEVEN_DIGITS + 3)
    manifest.write(tmp_path)
    found = Manifest.load(tmp_path)
    assert isinstance(found.shards, ShardTable) and found == manifest
    names = [found.shards[n].name for n in range(SEVEN_DIGITS - 2, SEVEN_DIGITS + 3)]
    assert names[1:3] == ["shard-999999.tar", "shard-1000000.tar"]
    assert [shard_number(name) for name in names] == [*range(SEVEN_DIGITS - 2, SEVEN_DIGITS + 3)]
    text = (tmp_path / MANIFEST_NAME).read_bytes()
    assert text.index(b"shard-999999.tar") < text.index(b"shard-1000000.tar")
    assert member_name(SEVEN_DIGITS, 4) == "1000000-000004.u16"
    archive = shard_bytes(SEVEN_DIGITS, np.zeros((2, 4), np.uint16))
    assert archive[:18] == b"1000000-000000.u16" and len(archive) == archive_size(2, 4)


@pytest.mark.parametrize(
    "name", ["shard-0.tar", "shard-0000001.tar", "shard-00000a.tar", "shard-²00000.tar", "x"]
)
def test_other_names_are_no_shards(name: str) -> None:
    assert shard_number(name) is None
    assert shard_number(shard_name(1)) == 1


def test_there_may_be_four_million_shards_and_no_more() -> None:
    schema = Manifest.model_json_schema()["properties"]["shards"]
    assert schema["maxItems"] == MAX_SHARDS == 4_000_000


def test_orders_are_those_of_sorted_hashes() -> None:
    """Runs of earlier versions go on in their order."""
    for seed, epoch, count in ((0, 0, 0), (3, 1, 1), (7, 2, 500)):

        def key(item: int, place: tuple[int, int] = (seed, epoch)) -> bytes:
            text = f"{place[0]}/{place[1]}/{item}"
            return hashlib.blake2b(text.encode(), digest_size=16).digest()

        assert permutation(seed, epoch, count) == sorted(range(count), key=key)


def test_two_million_shards_open_within_a_gigabyte(tmp_path: Path) -> None:
    """With the order of the first epoch and the fingerprint; CPU time, as the machine is shared."""
    large(2_000_000).write(tmp_path)
    script = (
        "import re, sys, time\n"
        "from pathlib import Path\n"
        "from i3dist.data.corpus import Split\n"
        "from i3dist.data.manifest import Manifest\n"
        "start, folder = time.process_time(), Path(sys.argv[1])\n"
        "split = Split(folder, Manifest.load(folder))\n"
        "split.manifest.fingerprint, split.schedule(4, 8, 0).chunks(0, 0)\n"
        "print(time.process_time() - start)\n"
        "print(re.search('VmHWM:(.*)kB', Path('/proc/self/status').read_text())[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seconds, peak = map(float, done.stdout.split())
    assert seconds < 10
    assert peak < 1_000_000  # kB
