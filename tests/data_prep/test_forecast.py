"""The forecast: about right, shown before anything is made, and what cannot be is refused early."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_prep import beginning, forecast
from data_prep.choice import Choice
from data_prep.forecast import Forecast, Sample, measure
from data_prep.options import CORES
from data_prep.output import Output
from data_prep.output_settings import OutputSettings
from data_prep.reading.files import file_source
from data_prep.sources import Part, Record, Share
from i3dist.data.manifest import Manifest
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from tests.data_prep.advice import counting
from tests.data_prep.corpus import build

SETTINGS = OutputSettings(
    source="s",
    revision="r",
    tokenizer="trained",
    tokenizer_sample_mb=1,
    vocab_size=32_000,
    chunk_length=512,
    chunks_per_shard=None,
    valid_fraction=0.005,
    seed=0,
)


def test_ten_billion_tokens_by_hand() -> None:
    found = Forecast.of(Sample(1000, 10e9, 10e6, 7200.0), SETTINGS, 2)
    assert found.tokens == 10_020_000_000
    assert (found.chunks_per_shard, found.shards) == (2048, 9556)
    # 2,048 members of 512 + 1,024 bytes, and 1.5 GB of ids and urls.
    assert found.output_bytes == pytest.approx(30.1e9 + 1.5e9, rel=0.01)
    assert found.run_bytes == pytest.approx(20e9 + 1.5e9, rel=0.01)
    assert found.times and found.times.all == pytest.approx((7200 + 250) / min(2, CORES), rel=0.01)
    assert found.lines(Path("out"), 10**12) == [
        "about 10.0 G tokens, 9,556 shards of 2,048 chunks, 31.6 GB",
        "about 53.2 GB of disk while it works; 1.0 TB are free at out",
        f"about {3725 * 2 // min(2, CORES) // 60} min in {min(2, CORES)} processes, as a sample "
        "was tokenized",
    ]


def test_several_machines_share_all_but_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 30 billion tokens packing sorts once more, and the disk holds both forms."""
    monkeypatch.setattr(forecast, "CORES", 16)
    sample = Sample(10_000, 1.3e12, 1.3e9, 52_000.0)
    alone, shared = (Forecast.of(sample, SETTINGS, 16, nodes) for nodes in (1, 32))
    assert alone.times and shared.times
    packing = alone.tokens / 40e6 + alone.tokens / 100e6
    assert alone.times == pytest.approx((52_000 / 16, packing / 16, 650))
    assert shared.times == pytest.approx((52_000 / 512, packing / 512, 650))
    assert shared.disk_bytes == alone.disk_bytes + alone.run_bytes
    assert shared.lines(Path("out"), 10**13)[2] == (
        "about 102 s to tokenize and 89 s to pack on 32 machines with 16 processes each, and 11 "
        "min to finish, as a sample was tokenized"
    )


@pytest.mark.parametrize("changes", [{"vocab_size": 128_256}, {"format": "chat"}])
def test_tokens_of_four_bytes_take_twice_the_disk(changes: dict[str, object]) -> None:
    settings = SETTINGS.model_copy(update=changes)
    found = Forecast.of(Sample(1000, 10e9, 10e6, 7200.0), settings, 2)
    assert found.output_bytes == pytest.approx(10.02e9 * 2560 / 512 + 1.5e9, rel=0.01)
    assert found.run_bytes == pytest.approx(40e9 + 1.5e9, rel=0.01)


def test_limits_and_disk() -> None:
    found = Forecast.of(Sample(1000, 10e9, 10e6, None), SETTINGS, 2)
    found.check(Path("out"), 53 * 10**9, 9556)
    found.check(Path("out"), 43 * 10**9, 8000)  # an estimate that is off by a fifth refuses nothing
    with pytest.raises(UserError, match=r"53\.2 GB of disk are needed at out, and 40\.0 GB are"):
        found.check(Path("out"), 40 * 10**9, 9556)
    with pytest.raises(UserError, match="9,556 shards, more than 7,000: raise --chunks-per-shard"):
        found.check(Path("out"), 53 * 10**9, 7000)
    vague = Forecast.of(Sample(1000, 10e9, 10e6, None, error=0.4), SETTINGS, 2)
    vague.check(Path("out"), 33 * 10**9, 6000)  # nor does one that may be off by more


class Unsized(Part):
    """A part that does not know its size."""

    def records(self) -> list[Record]:
        raise AssertionError("it is not read")


def test_a_source_of_unknown_size_is_not_read() -> None:
    assert measure([Unsized()], None) is None


def test_a_forecast_is_near_what_is_made(corpus: Any, built: Path) -> None:
    """Of a corpus in five formats, a part of which is compressed."""
    sample = measure(file_source(corpus[0]).parts(), Tokenizer.load(built / "tokenizer.json"))
    assert sample is not None and sample.seconds is not None
    made = sum(Manifest.load(built / split).tokens for split in ("train", "valid"))
    assert made / 2 < sample.tokens < made * 2


def test_a_sample_ends_in_time(monkeypatch: pytest.MonkeyPatch, corpus: Any, built: Path) -> None:
    monkeypatch.setattr(forecast, "_SECONDS", 0.0)
    tokenizer = Tokenizer.load(built / "tokenizer.json")
    sample = measure(file_source(corpus[0]).parts(), tokenizer)
    made = sum(Manifest.load(built / split).tokens for split in ("train", "valid"))
    assert sample is not None and made / 4 < sample.tokens < made * 4
    assert sample.error is None and not sample.is_whole
    assert "could not be read to their end" in Forecast.of(sample, SETTINGS, 1).notes[0]


@dataclass(frozen=True)
class Texts(Part):
    """So many copies of a text, and then of a number."""

    text: str
    count: int
    share: Share | None = None
    packing: int = 1  # how many times smaller its file is

    def records(self) -> list[Record]:
        texts = [self.text] * self.count + ["0.25; 17"] * self.count
        return [Record(str(number), "", "", text) for number, text in enumerate(texts)]

    @property
    def size(self) -> int:
        return sum(len(str(record.text)) for record in self.records()) // self.packing


@pytest.mark.parametrize("weight", [1.0, 20.0])
def test_an_estimate_tells_its_error(built: Path, weight: float) -> None:
    """Where parts differ, as those of several languages do, and the texts in them."""
    tokenizer = Tokenizer.load(built / "tokenizer.json")
    shares = [Share(0, 1.0)] * 40 + [Share(1, weight)] * 10
    texts = ["a line of words " * 90, "[0, 0.5] " * 60]
    parts = [
        Texts(texts[n % 7 > 4], 60 + n % 4, share, packing=4 if share.source else 1)
        for n, share in enumerate(shares)
    ]
    counts = (
        share.weight * sum(len(tokenizer.encode(str(record.text))) for record in part.records())
        for part, share in zip(parts, shares, strict=True)
    )
    sample, made = measure(parts, tokenizer), sum(counts)
    assert sample and sample.error and 0.04 < sample.error < 0.3
    assert abs(sample.tokens - made) < 0.02 * made
    assert f"(± {sample.error:.0%})" in Forecast.of(sample, SETTINGS, 1).lines(Path(), 0)[0]
    none = measure(parts, tokenizer, choice=Choice(min_tokens=10**6))
    assert none and (none.tokens, none.error) == (0, None)
    assert "none of the documents" in Forecast.of(none, SETTINGS, 1).lines(Path(), 0)[-1]
    few = measure(parts[:3], tokenizer)  # of which all are read
    assert few and few.error == 0.02


@pytest.mark.parametrize("given", [True, False])
def test_a_dry_run_shows_all_and_makes_nothing(
    texts: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: bool
) -> None:
    options = ["--tokenizer", built / "tokenizer.json"] if given else []
    build(texts, tmp_path / "deep" / "out", "--dry-run", *options, "--task", "1/4")
    assert ("on 4 machines with 1 process each" in capsys.readouterr().out) == given
    build(texts, tmp_path / "deep" / "out", "--dry-run", *options)
    said = capsys.readouterr().out
    assert said.count("about") == 3 - (not given) and "free at" in said
    assert ("4 bytes a token assumed" in said) != given
    assert not (tmp_path / "deep").exists()


def test_a_run_that_cannot_fit_is_refused_before_it_tokenizes(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And goes on when there is room."""
    monkeypatch.setattr(beginning, "FORECAST_BYTES", 1)
    spilled = counting(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(Output, "free_bytes", lambda _: 1000)
        for options in ([], ["--dry-run"]):
            with pytest.raises(UserError, match=r"disk are needed at .*: free some, or choose"):
                build(texts, tmp_path / "out", *options)
    with monkeypatch.context() as patched:
        patched.setattr(beginning, "MAX_SHARDS", 1)
        with pytest.raises(UserError, match=r"about .* shards, more than 1: raise --chunks-per"):
            build(texts, tmp_path / "out")
    assert not spilled
    build(texts, tmp_path / "out")
    assert "about" in capsys.readouterr().out


def test_a_small_source_is_made_without_an_estimate(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(texts, tmp_path / "out")
    assert "about" not in capsys.readouterr().out


def test_free_bytes_are_those_of_the_nearest_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("not/there")
    free = shutil.disk_usage(tmp_path).free
    assert Output(tmp_path / "link" / "out").free_bytes() == pytest.approx(free, rel=0.05)
