"""report.py: its figures equal those counted from the shards, and its page stands alone."""

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import report
from data_prep.checks import index_check
from data_prep.checks.stream import Stream
from data_prep.reports import index_statistics
from data_prep.reports.figures import Figures
from data_prep.reports.index_statistics import HISTORY, Domains, domains_of, geometric, measure
from data_prep.reports.lookup import SplitReader, reading_index
from data_prep.reports.page import page
from data_prep.shard import main as make_shards
from i3dist.data.corpus import Split
from i3dist.data.shards import read_shard
from i3dist.errors import UserError
from tests.data.splits import documents_of, split_of
from tests.data_prep.advice import write
from tests.data_prep.corpus import read_chunks, read_documents
from tests.html_page import Page

Corpus = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module", params=["train", "valid"])
def figures(built: Path, request: pytest.FixtureRequest) -> Figures:
    return Figures.of(built, request.param, 0)


def test_lengths_and_chunks_are_those_of_the_shards(figures: Figures) -> None:
    reader, statistics = figures.reader, figures.statistics
    manifest = reader.manifest
    lengths: list[int] = []
    chunks: list[set[tuple[int, int]]] = []
    for number, shard in enumerate(manifest.shards):
        for chunk, tokens in enumerate(read_chunks(reader.folder / shard.name)):
            for token in tokens.tolist():
                if token == manifest.bos_id:
                    lengths.append(0)
                    chunks.append(set())
                if token != manifest.pad_id:
                    lengths[-1] += 1
                    chunks[-1].add((number, chunk))
    assert np.flatnonzero(statistics.lengths).tolist() == sorted(set(lengths))
    assert Counter(lengths) == {n: c for n, c in enumerate(statistics.lengths.tolist()) if c}
    counts = Counter(map(len, chunks))
    assert counts == {n: c for n, c in enumerate(statistics.chunks.tolist()) if c}
    assert statistics.longest == max(lengths)
    assert statistics.quantile(0.5) == sorted(lengths)[(len(lengths) - 1) // 2]
    assert (statistics.documents, statistics.tokens) == (manifest.documents, manifest.tokens)


def history_of_shards(reader: SplitReader | Split) -> list[int]:
    """Tokens by history: the depth of their chunk, if their document began before the chunk."""
    manifest = reader.manifest
    counts = np.zeros(HISTORY + 1, np.int64)
    for shard in range(len(manifest.shards)):
        tokens, depths = read_shard(reader.folder, manifest, shard)[:2]
        for depth, chunk in zip(depths.tolist(), tokens, strict=True):
            begins = np.flatnonzero(chunk == manifest.bos_id)
            end = int((chunk != manifest.pad_id).sum())
            continued = int(begins[0]) if len(begins) else end
            counts[min(depth, HISTORY)] += continued
            counts[0] += end - continued
    return counts.tolist()


def test_history_is_what_training_sees(figures: Figures) -> None:
    assert figures.statistics.history.tolist() == history_of_shards(figures.reader)


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=20), per_shard=st.integers(1, 40))
def test_history_of_documents_that_are_long_beside_chunks(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], per_shard: int
) -> None:
    documents = documents_of(0, lengths, 100)
    split = split_of(tmp_path_factory.mktemp("h") / "train", documents, 8, per_shard, 100)
    statistics = measure(Stream.of(split.folder, split.manifest, None))
    assert statistics.history.tolist() == history_of_shards(split)
    found = Counter({n: c for n, c in enumerate(statistics.lengths.tolist()) if c})
    assert found == Counter(length + 2 for length in lengths)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_statistics_do_not_depend_on_how_the_index_is_read(
    built: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    reader = SplitReader(built, "train")
    stream = Stream.of(reader.folder, reader.manifest, reader.tokenizer)
    whole = measure(stream)
    monkeypatch.setattr(index_check, "ROWS_AT_A_TIME", rows)
    monkeypatch.setattr(index_statistics, "ROWS_AT_A_TIME", rows)
    parts = measure(stream)
    assert (whole.lengths == parts.lengths).all() and (whole.chunks == parts.chunks).all()
    assert (whole.history == parts.history).all()
    assert whole.domains == parts.domains


def test_bytes_per_token_are_those_of_the_text(corpus: Corpus, figures: Figures) -> None:
    reader = figures.reader
    texts = [text for _, _, text in read_documents(reader.folder, reader.tokenizer)]
    tokens = reader.manifest.tokens - 2 * reader.manifest.documents
    assert figures.sample.of == len(reader.manifest.shards)
    exact = sum(len(text.encode()) for text in texts) / tokens
    is_all = figures.sample.shards == figures.sample.of
    assert figures.sample.bytes_per_token == pytest.approx(exact, rel=1e-9 if is_all else 0.1)


def test_domains(figures: Figures) -> None:
    urls = [
        "https://www.example.org/a?b#c",
        "http://user@example.org:8080",
        "s3://bucket/key",
        "folder/file.jsonl#5",
        "odd.jsonl#5",
        "",
        None,
    ]
    assert domains_of(pa.array(urls)).to_pylist() == [
        *("example.org", "example.org", "bucket", "folder", "odd.jsonl", "(no URL)", "(no URL)")
    ]
    assert sum(figures.statistics.domains.tokens.values()) == figures.reader.manifest.tokens
    assert figures.domains()[0][0] == "example.org"


def test_too_many_domains_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_statistics, "MOST_DOMAINS", 4)
    domains = Domains()
    for batch in range(5):
        names = ["big", *(f"{batch}-{n}" for n in range(3))]
        domains.add(pa.array(names), pa.array([100, 1, 1, 1]))
    assert len(domains.tokens) <= 4
    assert domains.top(1) == [("big", 500)]
    assert domains.merged + sum(domains.tokens.values()) == 515


def test_geometric_bins_hold_everything_once() -> None:
    counts = np.zeros(1025, np.int64)
    counts[[3, 4, 100, 1024]] = 1, 2, 3, 4
    edges, bins = geometric(counts, per_octave=1)
    assert sum(bins) == 10 and len(edges) == len(bins) + 1
    assert edges[0] == 2 and edges[-1] == 1025


def test_examples_are_documents_of_the_source(corpus: Corpus, figures: Figures) -> None:
    assert [example.kind for example in figures.examples] == [
        *("short", "short", "median", "median", "long", "long")
    ]
    tokens = [example.tokens for example in figures.examples]
    assert tokens[0] <= tokens[2] <= tokens[4]
    for example in figures.examples:
        text = corpus[1][example.id]
        assert text.startswith(example.begin) and text.endswith(example.end or example.begin)


def test_the_seed_draws_the_examples(built: Path) -> None:
    drawn = [[e.id for e in Figures.of(built, "train", seed).examples] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_page_stands_alone(figures: Figures) -> None:
    text = page(figures)
    assert page(figures) == text, "not the same twice"
    parsed = Page()
    parsed.feed(text)
    assert parsed.open == [] and parsed.seen["svg"] == 3 and parsed.seen["article"] == 6
    assert not parsed.seen["script"] and all(link.startswith("#") for link in parsed.links)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    for name, value, _ in figures.totals():
        assert name in text and value in text
    assert "#010203" not in text and "var(--accent)" in text


def test_text_cannot_break_the_page(figures: Figures) -> None:
    evil = "<script>alert(1)</script>\x00\x1b&"
    changed = figures.examples[0]._replace(begin=evil, id=evil, url=evil)
    figures = Figures(figures.reader, figures.statistics, figures.sample, [changed])
    figures.statistics.domains.tokens[evil] = 1 << 40
    text = page(figures)
    del figures.statistics.domains.tokens[evil]
    assert "<script" not in text and "\x00" not in text and "\x1b" not in text


def test_the_program_prints_tables_and_writes_the_page(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a.html"
    report.main([str(built), "--html", str(target)])
    out = capsys.readouterr().out
    manifest = SplitReader(built, "train").manifest
    assert f"{manifest.documents:,}" in out and f"{manifest.tokens:,}" in out
    assert "can gain from compressed history" in out and "\x1b" not in out
    assert target.read_text().startswith("<!DOCTYPE html>")


def test_the_page_on_standard_output_stands_alone(
    built: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report.main([str(built), "--html", "/dev/stdout"])
    out, aside = capfd.readouterr()
    assert out.startswith("<!DOCTYPE html>") and out.endswith("</html>\n")
    assert "can gain from compressed history" in aside


def test_each_of_several_sources_is_shown(
    built: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A single one is one line of the page."""
    other = write(tmp_path / "in" / "<b>.jsonl", ["another text", "one more"])
    words = ["--source", f"{texts}/a.jsonl:2", "--source", str(other), "--out", str(tmp_path / "o")]
    make_shards([*words, "--vocab-size", "300", "--valid-fraction", "0", "--workers", "1"])
    capsys.readouterr()
    report.main([str(tmp_path / "o"), "--html", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    printed = capsys.readouterr().out
    assert "<td>&lt;b&gt;.jsonl</td><td>1</td><td>2</td>" in text and "Source:" not in text
    for name, weight in (("a.jsonl", "2"), ("<b>.jsonl", "1")):
        assert re.search(rf"│ {re.escape(name)} +│ +{weight} │.* {weight}\.000 │\n", printed)
    single = page(figures := Figures.of(built, "train", 0))
    assert f"<p>Source: {figures.reader.manifest.source}</p>" in single
    assert "<h2>Sources</h2>" not in single


def test_bad_input_is_one_line(built: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no manifest at"):
        report.main([str(tmp_path)])
    with pytest.raises(
        UserError, match=r"--html: .*none/a\.html cannot be written: .*make the folder"
    ):
        report.main([str(built), "--html", str(tmp_path / "none" / "a.html")])
    shutil.copytree(built, tmp_path / "made")
    index = tmp_path / "made" / "train" / "index.parquet"
    index.write_bytes(index.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"index\.parquet cannot be read \(.+\): restore it"):
        report.main([str(tmp_path / "made")])
    index.unlink()
    with pytest.raises(UserError, match=r"index\.parquet is missing: it says where"):
        report.main([str(tmp_path / "made")])


def test_a_file_that_is_not_the_index_is_not_called_it(tmp_path: Path) -> None:
    for name, kind in (("other", FileNotFoundError), ("", IsADirectoryError)):
        with pytest.raises(kind), reading_index(tmp_path):
            (tmp_path / name).read_bytes()
    unnamed = pytest.raises(UserError, match=r"index\.parquet cannot be read \(gone\)")
    with unnamed, reading_index(tmp_path):
        raise FileNotFoundError("gone")
