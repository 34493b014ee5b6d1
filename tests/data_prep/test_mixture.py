"""Several sources: each is taken as often as its weight says, for any number of workers."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.checks.folder_check import FolderCheck
from data_prep.reading.files import file_source
from data_prep.reading.mixture import MOST_SOURCES, Weighted, mixed
from data_prep.shuffle import copies, hashes
from data_prep.sources import Share
from data_prep.verify import main as verify
from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.manifest import Manifest
from i3dist.data.shard_table import ShardTable
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from tests.data.test_large_manifest import naive_fingerprint
from tests.data_prep.corpus import arguments, build, read_documents, tree_digest
from tests.data_prep.test_evidence import REFUSED, change, interrupt, texts_of

COUNT = 300


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Three folders of the same names, whose documents say where they come from."""
    folders = [tmp_path / name / "data" for name in ("one", "two", "three")]
    for folder in folders:
        folder.mkdir(parents=True)
        for number in range(2):
            rows = [{"text": f"{folder.parent.name} {number} {n} " * 5} for n in range(COUNT // 2)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{number}.jsonl").write_text(lines)
    return folders


def taken(out: Path) -> Counter[str]:
    """How often each document is in the output."""
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    splits = [read_documents(out / name, tokenizer) for name in ("train", "valid")]
    texts = [{text for *_, text in documents} for documents in splits]
    assert not texts[0] & texts[1]
    return Counter(" ".join(text.split()[:3]) for documents in splits for *_, text in documents)


def mix(out: Path, tokenizer: Path, *specs: str, more: tuple[object, ...] = ()) -> None:
    others = [word for spec in specs[1:] for word in ("--source", spec)]
    build(specs[0], out, "--tokenizer", tokenizer, *others, *more)


def weights(folders: list[Path], *given: float) -> list[str]:
    return [f"{folder}:{weight}" for folder, weight in zip(folders, given, strict=True)]


def test_each_source_is_taken_as_its_weight_says(
    sources: list[Path], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix(tmp_path / "out", tokenizer, *weights(sources, 1, 0.3, 2.5))
    found = taken(tmp_path / "out")
    by_source = {name: Counter[int]() for name in ("one", "two", "three")}
    for text, count in found.items():
        by_source[text.split()[0]][count] += 1
    assert by_source["one"] == {1: COUNT}
    assert set(by_source["two"]) == {1} and 60 < by_source["two"][1] < 120
    assert set(by_source["three"]) == {2, 3} and by_source["three"].total() == COUNT
    assert 120 < by_source["three"][3] < 180
    manifests = [Manifest.load(tmp_path / "out" / name) for name in ("train", "valid")]
    assert manifests[0].sources == manifests[1].sources
    assert all(isinstance(m.shards, ShardTable) for m in manifests), "the fast way to read it"
    assert all(m.fingerprint == naive_fingerprint(m) for m in manifests)
    counts = manifests[0].sources or ()
    assert [source.usable for source in counts] == [COUNT] * 3
    assert [source.documents for source in counts] == [
        sum(times * number for times, number in found.items()) for found in by_source.values()
    ]
    assert sum(source.tokens for source in counts) == sum(m.tokens for m in manifests)
    assert sum(source.documents for source in counts) == sum(m.documents for m in manifests)
    said = capsys.readouterr().out
    for source in counts:
        assert f"{source.epochs:.3f}" in said and f"{source.tokens:,}" in said
    verify([str(tmp_path / "out")])
    assert Corpus.open(tmp_path / "out", ModelSettings(chunk_length=64)).fingerprint


def test_workers_and_a_stop_change_no_byte(
    sources: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    specs = weights(sources, 1, 0.3, 2.5)
    mix(tmp_path / "whole", tokenizer, *specs)
    mix(tmp_path / "out", tokenizer, *specs, more=("--workers", 3))
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")
    others = [word for spec in specs[1:] for word in ("--source", spec)]
    options = ["--tokenizer", tokenizer, *others]
    for after in (1, 4, 5):
        interrupt(specs[0], tmp_path / f"out-{after}", after, *options)  # type: ignore[arg-type]
        mix(tmp_path / f"out-{after}", tokenizer, *specs)
        assert texts_of(tmp_path / f"out-{after}") == texts_of(tmp_path / "whole")


def test_a_single_source_of_weight_1_is_what_it_was(
    sources: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    mix(tmp_path / "plain", tokenizer, str(sources[0]))
    mix(tmp_path / "out", tokenizer, f"{sources[0]}:1")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "plain")
    text = (tmp_path / "out" / "train" / "manifest.json").read_text()
    assert '"version": 1' in text and "sources" not in text


def test_files_of_all_sources_are_numbered_one_after_the_other(sources: list[Path]) -> None:
    source = mixed([Weighted(file_source(folder), 1.0) for folder in sources])
    for part in source.parts():
        (number,) = part.files
        path, _ = source.files[number]
        first = next(iter(part.records()))
        assert isinstance(first.text, str)
        name, file = first.text.split()[:2]
        assert (path.parent.parent.name, path.stem) == (name, file)


def test_another_weight_or_order_is_another_output(
    sources: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    specs = weights(sources, 1, 0.3, 2.5)
    mix(tmp_path / "out", tokenizer, *specs)
    for other in (weights(sources, 1, 0.30000001, 2.5), [*specs[1:], specs[0]], specs[:2]):
        with pytest.raises(UserError, match=r"was made with source .*choose another --out"):
            mix(tmp_path / "out", tokenizer, *other)
    change(sources[1] / "1.jsonl")
    with pytest.raises(UserError, match=rf"two/data/1\.jsonl changed, {REFUSED}"):
        mix(tmp_path / "out", tokenizer, *specs)


def test_a_sample_for_the_tokenizer_is_drawn_by_size_and_weight(
    sources: list[Path], tmp_path: Path
) -> None:
    """With a share of a thousandth the words of a source are not worth an entry."""
    specs = [f"{sources[0]}:0.001", str(sources[1])]
    build(specs[0], tmp_path / "out", "--source", specs[1], "--tokenizer-sample-mb", 9)
    vocabulary = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert "Ġtwo" in vocabulary and "Ġone" not in vocabulary


def test_a_mixture_that_takes_nothing_or_too_much_is_one_line(
    sources: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no document is taken: raise the weight of a --source"):
        mix(tmp_path / "out", tokenizer, f"{sources[0]}:0.000001")
    mix(tmp_path / "out", tokenizer, f"{sources[0]}:0.5")  # the folder is free again
    many = [str(sources[0])] * (MOST_SOURCES + 1)
    with pytest.raises(UserError, match=r"101 sources are more than 100: put files"):
        mix(tmp_path / "many", tokenizer, *many)
    with pytest.raises(UserError, match=r"no file or folder .*nothing"):
        mix(tmp_path / "none", tokenizer, str(sources[0]), f"{tmp_path / 'nothing'}:2")


def test_one_source_given_twice_is_taken_twice(
    sources: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    mix(tmp_path / "out", tokenizer, str(sources[0]), str(sources[0]))
    assert set(taken(tmp_path / "out").values()) == {2}


def test_many_long_names_fit_into_a_manifest(
    sources: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    names = [tmp_path / (f"{number:03d}" * 80) for number in range(MOST_SOURCES)]
    for name in names:
        name.symlink_to(sources[0] / "0.jsonl")
        name.rename(name.with_suffix(".jsonl"))
    mix(tmp_path / "out", tokenizer, *(f"{name}.jsonl:0.01" for name in names))
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert manifest.source.startswith("100 sources ") and len(manifest.sources or ()) == 100


@given(text=st.binary(), seed=st.integers(0, 2**63 - 1), number=st.integers(0, 3),
       low=st.floats(1e-6, 4), high=st.floats(1e-6, 4))  # fmt: skip
def test_a_smaller_weight_takes_some_of_the_copies_of_a_larger_one(
    text: bytes, seed: int, number: int, low: float, high: float
) -> None:
    low, high = sorted((low, high))
    few, many = (copies(text, "p", seed, Share(number, weight)) for weight in (low, high))
    assert many[: len(few)] == few and len(set(many)) == len(many)
    assert low - 1 < len(few) < low + 1 and high - 1 < len(many) < high + 1
    others = copies(text, "p", seed, Share(number + 1, high))
    assert not set(many) & set(others)
    if not number:
        assert (
            copies(text, "p", seed, None)
            == [hashes(text, "p", seed)]
            == (copies(text, "p", seed, Share(0, 1.0)))
        )


def test_what_is_taken_says_nothing_of_its_place() -> None:
    """Neither of the order nor of the split."""
    share = Share(0, 0.5)
    found = [copies(f"{n}".encode(), "p", 0, share) for n in range(4000)]
    firsts = [hashed[0] for hashed in found if hashed]
    assert abs(len(firsts) - 2000) < 150
    for start in (0, 16):
        assert abs(sum(hashed[start] >= 128 for hashed in firsts) - len(firsts) / 2) < 150


def test_of_duplicates_all_are_taken_or_none(
    sources: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    """So the first stays, and a weight is the share of the texts that stay."""
    lines = [json.dumps({"text": f"text {n % 300}"}) for n in range(3000)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    few, every = tmp_path / "few", tmp_path / "every"
    for out, weight in ((few, 0.3), (every, 1)):
        spec = f"{tmp_path / 'many.jsonl'}:{weight}"
        mix(out, tokenizer, str(sources[0]), spec, more=("--deduplicate",))
    found = [[text for text in taken(out) if text.startswith("text")] for out in (few, every)]
    assert len(set(found[1])) == len(found[1]) == 300
    assert 60 < len(set(found[0])) == len(found[0]) < 120 and {*found[0]} < {*found[1]}
    rows = pq.read_table(few / "train" / "index.parquet")["id"].to_pylist()
    assert all(int(row.split("#")[1]) < 300 for row in rows if row.startswith("many.jsonl"))


def test_the_command_line_of_a_mixture(sources: list[Path], tmp_path: Path) -> None:
    """`arguments` gives one source; others come after it."""
    words = arguments(f"{sources[0]}:0.5", tmp_path / "out", "--source", sources[1])
    assert words.count("--source") == 2


def test_a_column_is_given_once_or_for_each_source(
    sources: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    path = sources[1] / "0.jsonl"
    path.write_text(path.read_text().replace('"text"', '"body"'))
    specs = [str(sources[0]), str(path)]
    columns = ("--text-column", "text", "--text-column", "body")
    mix(tmp_path / "out", tokenizer, *specs, more=columns)
    assert {text.split()[0] for text in taken(tmp_path / "out")} == {"one", "two"}
    assert Manifest.load(tmp_path / "out" / "train").source == "data:1 + 0.jsonl, column body:1"
    with pytest.raises(UserError, match=r"column body.*was made|was made with source"):
        mix(tmp_path / "out", tokenizer, *specs)
    with pytest.raises(UserError, match=r"2 --text-column and 1 --source: give the column once"):
        mix(tmp_path / "one", tokenizer, specs[0], more=columns)


@pytest.mark.parametrize("key", ["name", "weight", "usable", "documents", "tokens"])
@pytest.mark.parametrize("both", [False, True])
def test_a_wrong_count_of_a_source_is_found(
    sources: list[Path], tokenizer: Path, tmp_path: Path, key: str, both: bool
) -> None:
    """In one manifest any; in both what the splits contradict."""
    mix(tmp_path / "out", tokenizer, *weights(sources[:2], 1, 0.3))
    for split in ("train", "valid") if both else ("valid",):
        path = tmp_path / "out" / split / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["sources"][1][key] *= 2
        path.write_text(json.dumps(manifest))
    found = FolderCheck(tmp_path / "out").damages
    assert [damage.place for damage in found] == ["key sources"] * (
        1 if not both else key in ("documents", "tokens")
    )
