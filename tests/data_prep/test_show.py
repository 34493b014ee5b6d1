"""show.py shows exactly what the index says and what the training loader yields."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import report, show
from data_prep.reports.lookup import SplitReader
from data_prep.reports.trained import TrainedRun
from i3dist.config import Settings
from i3dist.data.lanes import LaneWindows
from i3dist.data.manifest import Manifest, shard_name
from i3dist.data.schedule import Version, lanes_of_rank
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.training.ledger import Entry, samples_hash

Corpus = tuple[Path, dict[str, str]]
LANES, WINDOW, ACCUMULATION = 4, 3, 2


def make_run(folder: Path, version: Version, lanes: int = LANES) -> Path:
    """The folder of a run with these settings; one of version 1 is older than the setting."""
    values = {
        "train.lanes": lanes,
        "train.window_chunks": WINDOW,
        "train.accumulation": ACCUMULATION,
        "train.seed": 5,
        "train.schedule": version,
    }
    folder.mkdir(parents=True)
    text = Settings().with_values(**values).to_yaml()
    if version == 1:
        text = "".join(line for line in text.splitlines(keepends=True) if "schedule: 1" not in line)
    (folder / "settings.yaml").write_text(text)
    return folder


def write_ledger(run: TrainedRun, steps: int, **changes: object) -> None:
    with (run.run / "ledger.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            values = {
                "step": step,
                "samples": samples_hash(run.schedule, step * ACCUMULATION, ACCUMULATION),
                "lanes": "",
                "loss": 1.0,
                "gradient_norm": 1.0,
                "skipped": None,
            }
            file.write(Entry.model_validate(values | changes).model_dump_json() + "\n")
        file.write('{"step": 99')  # torn


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    show.main([str(word) for word in words])
    return capsys.readouterr().out


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_reads_what_the_loader_yields(
    built: Path, tmp_path: Path, version: Version, ranks: int
) -> None:
    run = TrainedRun(make_run(tmp_path / "run", version), built)
    reader, manifest = SplitReader(built, "train"), Manifest.load(built / "train")
    steps = 3 * manifest.chunks // (LANES * WINDOW * ACCUMULATION)  # three epochs
    idle = 0
    for rank in range(ranks):
        lanes = lanes_of_rank(LANES, rank, ranks)
        loader = LaneWindows(built / "train", manifest, run.schedule, lanes)
        for step in (1, 2, steps // 3, steps // 3 + 1, steps):
            windows = [(step - 1) * ACCUMULATION + n for n in range(ACCUMULATION)]
            batches = [loader[index][0] for index in windows]  # type: ignore[index]
            for row, lane in enumerate(lanes):
                yielded = [chunk for batch in batches for chunk in batch.tokens[row]]
                places = run.places(step, lane)
                assert len(places) == len(yielded) == WINDOW * ACCUMULATION
                for place, tokens in zip(places, yielded, strict=True):
                    if place is None:
                        assert (tokens == manifest.pad_id).all()
                        idle += 1
                    else:
                        assert reader.chunk(*place).tolist() == tokens.tolist()
    assert (idle > 0) == (version == 1)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("lanes", [1, 4, 300])
def test_the_first_reading_of_every_chunk_leads_back_to_it(
    built: Path, tmp_path: Path, version: Version, lanes: int
) -> None:
    """300 lanes are more than there are shards."""
    run = TrainedRun(make_run(tmp_path / "run", version, lanes), built)
    places = [
        (shard, chunk)
        for shard, size in enumerate(run.schedule.shard_chunks)
        for chunk in range(size)
    ]
    for place in places:
        step, lane = run.reading(*place)
        assert place in run.places(step, lane)
        # Nothing reads it before.
        window, _, k = run.schedule.first_reading(*place)
        assert run.schedule.chunks(window, lane)[k] == place
        assert window * WINDOW + k < run.schedule.plans(0)[lane].chunks


def test_the_text_of_a_step_is_that_of_the_loaders_tokens(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = TrainedRun(make_run(tmp_path / "run", 2), built)
    write_ledger(run, 4)
    out = shown(capsys, built, "--step", 3, "--lane", 2, "--run", run.run)
    assert out.startswith(f"{run.run}: step 3, lane 2: in the ledger\n")
    reader = SplitReader(built, "train")
    for shard, chunk in run.places(3, 2):  # type: ignore[misc]
        parts = reader.parts(shard, chunk)
        assert f"train/{shard_name(shard)}, chunk {chunk}: 64 tokens" in out
        assert all(part.text in out and f"id {part.piece.id}\n" in out for part in parts)
        whole = "".join(part.text for part in parts)
        bad = "\N{REPLACEMENT CHARACTER}"
        assert whole.strip(bad) == reader.tokenizer.decode(reader.chunk(shard, chunk)).strip(bad)
    assert "not in the ledger" in shown(capsys, built, "--step", 5, "--lane", 2, "--run", run.run)


def test_every_chunk_shows_its_documents_and_their_places(built: Path) -> None:
    reader = SplitReader(built, "train")
    tokenizer, manifest = Tokenizer.load(built / "tokenizer.json"), reader.manifest
    seen: dict[int, list[int]] = {}
    for shard in range(len(manifest.shards)):
        for chunk in range(manifest.shards[shard].chunks):
            tokens, end = reader.chunk(shard, chunk), 0
            for part in reader.parts(shard, chunk):
                assert part.start == end
                end = part.stop
                ids = seen.setdefault(part.piece.document, [])
                assert part.before == len(ids)
                ids.extend(tokens[part.start : part.stop].tolist())
            assert (tokens[end:] == manifest.pad_id).all()
    assert len(seen) == manifest.documents
    for number, ids in seen.items():
        (pieces,) = reader.documents(f"#{number}")
        assert reader.text(pieces) == tokenizer.decode(ids)


def test_a_document_is_found_by_its_id_and_by_its_number(
    corpus: Corpus, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = SplitReader(built, "train")
    (pieces,) = reader.documents("#7")
    name = pieces[0].id
    by_number = shown(capsys, built, "--document", "#7", "--characters", 0)
    assert by_number == shown(capsys, built, "--document", name, "--characters", 0)
    assert by_number.endswith(f"\n{corpus[1][name]}\n")
    assert f"document 7  id {name}\nurl https://example.org/{name}\n" in by_number
    first = pieces[0]
    place = f"piece 0: train/{shard_name(first.shard)}, chunk {first.chunk}, token {first.offset}"
    assert place in by_number
    short = shown(capsys, built, "--document", "#7", "--characters", 11)
    text = corpus[1][name]
    assert f"\n{text[:6]}\n... {len(text) - 11:,} characters left out ...\n{text[-5:]}\n" in short


def test_a_document_shows_when_it_is_read(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = TrainedRun(make_run(tmp_path / "run", 2), built)
    out = shown(capsys, built, "--document", "#7", "--run", run.run)
    (pieces,) = SplitReader(built, "train").documents("#7")
    for piece in pieces:
        step, lane = run.reading(piece.shard, piece.chunk)
        assert f"epoch 1, step {step}, lane {lane} (not in the ledger)" in out
        assert (piece.shard, piece.chunk) in run.places(step, lane)


def test_other_data_is_refused(built: Path, tmp_path: Path) -> None:
    run = TrainedRun(make_run(tmp_path / "run", 2), built)
    write_ledger(run, 4, samples="0" * 32)
    words = [str(built), "--lane", "1", "--run", str(run.run), "--step"]
    with pytest.raises(UserError, match="says that step 2 read other chunks"):
        show.main([*words, "2"])
    show.main([*words, "5"])
    state = run.run / "checkpoints" / "step-00000004" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"data": "0" * 64}))
    with pytest.raises(UserError, match="was trained on other data than"):
        show.main([*words, "5"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--shard 1", "give --shard and --chunk"),
        ("--shard 1 --chunk 2 --lane 3", "give --shard and --chunk"),
        ("--step 1 --lane 1", "give --shard and --chunk"),
        ("", "give --shard and --chunk"),
        ("--shard 9999 --chunk 0", "has no shard 9999: the last is"),
        ("--shard 0 --chunk 4", "has no chunk 4: the last is 3"),
        ("--document nobody", "has no document with the id 'nobody'"),
        ("--document #99999999999999999999", "no document with the number"),
        ("--shard -1 --chunk 0", "not a whole number"),
        ("--step 0 --lane 0 --run RUN", "there is no step 0: the first is 1"),
        ("--step 1 --lane 4 --run RUN", "has no lane 4: the last is 3"),
        ("--step 1 --lane 0 --run RUN --split valid", "a run trains on the split train"),
        ("--step 1 --lane 0 --run /nowhere", "settings.yaml"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(
    built: Path, tmp_path: Path, words: str, message: str
) -> None:
    run = make_run(tmp_path / "run", 2)
    with pytest.raises(UserError, match=message):
        show.main([str(built), *words.replace("RUN", str(run)).split()])


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (show.main, ["s3://bucket/data", "--shard", "0", "--chunk", "0"]),
        (report.main, ["file:///data"]),
        (report.main, [".", "--html", "s3://bucket/page.html"]),
        (lambda words: Settings.load(None, words), ["run.path=s3://bucket/run"]),
    ],
)
def test_a_url_is_not_taken_for_a_folder_of_this_disk(
    main: Callable[[list[str]], object], words: list[str]
) -> None:
    with pytest.raises(UserError, match=r"a URL cannot be used here: name a file or folder"):
        main(words)


def test_a_missing_index_is_named(built: Path, tmp_path: Path) -> None:
    for path in built.rglob("*"):
        if path.is_file() and path.name != "index.parquet":
            copy = tmp_path / path.relative_to(built)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"index\.parquet is missing: it says where"):
        show.main([str(tmp_path), "--shard", "0", "--chunk", "0"])
