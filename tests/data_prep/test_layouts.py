"""Outputs of the version before this one, and the number of chunks per shard that a run chooses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import packing, ranges
from data_prep.output import Output
from data_prep.shard import main
from i3dist.data.manifest import Manifest
from i3dist.errors import UserError
from tests.data_prep.advice import counting, refusal
from tests.data_prep.corpus import arguments, build, tree_digest


def rewrite(out: Path, **changes: object) -> None:
    """Change settings in shard.json; None removes one."""
    path = out / "shard.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(settings))


def stopped(place: str, source: Path, out: Path, *options: object) -> None:
    """Have a run end where something is called."""

    def stop(*_: object) -> None:
        raise OSError("the power is gone")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(place, stop)
        refusal(source, out, *options)


def test_a_complete_output_of_the_former_layout_is_complete(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    build(texts, out)
    rewrite(out, layout=1)
    before = tree_digest(out)
    build(texts, out)
    assert capsys.readouterr().out.endswith("is already complete\n")
    assert tree_digest(out) == before
    with pytest.raises(UserError, match="with seed 0, not 1"):
        build(texts, out, "--seed", 1)


@pytest.mark.parametrize(("former", "options"), [(1, ()), (2, ("--deduplicate",))])
def test_runs_of_the_former_layout_are_made_again(
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    former: int,
    options: tuple[str, ...],
) -> None:
    out = tmp_path / "out"
    build(texts, tmp_path / "whole", "--vocab-size", 300, *options)
    stopped("data_prep.pack.write_shard", texts, out, *options)
    rewrite(out, layout=former)
    for run in out.glob(".work/runs/*.arrow"):
        run.write_bytes(b"another layout")
    spilled = counting(monkeypatch)
    build(texts, out, "--vocab-size", 300, *options)
    assert spilled and "an earlier version began this folder" in capsys.readouterr().out
    assert tree_digest(out) == tree_digest(tmp_path / "whole")


def automatic(source: Path, out: Path, *options: object) -> None:
    """Run without --chunks-per-shard."""
    words = arguments(source, out, "--vocab-size", 300, *options)
    place = words.index("--chunks-per-shard")
    del words[place : place + 2]
    main(words)


def kept(out: Path) -> Any:
    settings = Output(out).settings()
    assert settings
    numbers = {Manifest.load(out / split).chunks_per_shard for split in ("train", "valid")}
    assert numbers == {settings.chunks_per_shard}
    return settings.chunks_per_shard


def test_the_chosen_number_of_chunks_is_written_down_and_stays(
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for wanted, number in ((1, 16), (4, 2)):
        monkeypatch.setattr("data_prep.pack.SHARDS_WANTED", wanted)
        monkeypatch.setattr("data_prep.pack.FEWEST_CHUNKS", 1)
        automatic(texts, tmp_path / f"auto-{number}")
        found = kept(tmp_path / f"auto-{number}")
        made = Manifest.load(tmp_path / f"auto-{number}" / "train")
        assert len(made.shards) >= wanted - 1 and found & (found - 1) == 0
        build(texts, tmp_path / f"given-{number}", "--vocab-size", 300, "--chunks-per-shard", found)
        assert tree_digest(tmp_path / f"auto-{number}") == tree_digest(tmp_path / f"given-{number}")
    monkeypatch.setattr("data_prep.pack.SHARDS_WANTED", 1)
    before = tree_digest(tmp_path / "auto-2")
    automatic(texts, tmp_path / "auto-2")
    assert capsys.readouterr().out.endswith("is already complete\n")
    assert tree_digest(tmp_path / "auto-2") == before
    with pytest.raises(UserError, match=r"with chunks-per-shard \d+, not 99: choose another"):
        build(texts, tmp_path / "auto-2", "--vocab-size", 300, "--chunks-per-shard", 99)


def test_a_given_number_of_chunks_stays_without_the_option(texts: Path, tmp_path: Path) -> None:
    build(texts, tmp_path / "out", "--vocab-size", 300, "--chunks-per-shard", 5)
    automatic(texts, tmp_path / "out")
    assert kept(tmp_path / "out") == 5
    stopped("data_prep.pack.write_shard", texts, tmp_path / "begun", "--chunks-per-shard", 5)
    automatic(texts, tmp_path / "begun")
    assert kept(tmp_path / "begun") == 5


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ranges, "RANGE_TOKENS", 100)
    return None


@pytest.mark.usefixtures("small_ranges")
@pytest.mark.parametrize(
    "place", ["data_prep.pack.IndexWriter.close", "data_prep.output.Manifest.write"]
)
def test_what_is_packed_is_not_packed_again(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """After a stop that came late, even while splits are moved into place."""
    out = tmp_path / "out"
    build(texts, tmp_path / "whole", "--vocab-size", 300)
    stopped(place, texts, out)
    blocks: list[range] = []

    def run(task, jobs, *rest, real=packing.run_jobs):  # type: ignore[no-untyped-def]
        blocks.extend(jobs)
        return real(task, jobs, *rest)

    monkeypatch.setattr(packing, "run_jobs", run)
    build(texts, out, "--vocab-size", 300)
    assert blocks == []
    assert tree_digest(out) == tree_digest(tmp_path / "whole")
    build(texts, tmp_path / "again", "--vocab-size", 300)
    assert len(blocks[0]) > 3


@pytest.mark.usefixtures("small_ranges")
def test_a_stopped_run_is_packed_with_other_settings(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped("data_prep.output.Output.publish", texts, out)
    options = ["--chunk-length", 32, "--chunks-per-shard", 7, "--valid-fraction", 0.3]
    build(texts, out, "--vocab-size", 300, *options)
    build(texts, tmp_path / "whole", "--vocab-size", 300, *options)
    assert tree_digest(out) == tree_digest(tmp_path / "whole")
