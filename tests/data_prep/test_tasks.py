"""Tasks that share both passes out, and the merge after them: the bytes of one process."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from data_prep import ranges
from data_prep.arguments import TaskShare
from data_prep.output import Output
from data_prep.passes import failures
from data_prep.plan import Plan
from data_prep.reading.files import FilePart, FileSource, file_source
from data_prep.reading.readers import SourceFile, Span
from data_prep.sources import Part
from i3dist.data import encoders
from i3dist.errors import UserError
from i3dist.files import PARTIAL
from tests.data_prep.advice import counting, write
from tests.data_prep.corpus import arguments, build, text_of, tree_digest

ROOT = Path(__file__).parents[2]
Corpus = tuple[Path, dict[str, str]]


@pytest.fixture(autouse=True, scope="module")
def _encoders_are_not_compared() -> Iterator[None]:
    """To save time: every command would do it twice."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encoders, "_compare", lambda *_: None)
        yield


def run_all(
    source: Path, out: Path, tasks: Sequence[str], *options: object, packing: Sequence[str] = ()
) -> None:
    for task in tasks:
        build(source, out, "--task", task, *options)
    for task in packing:
        build(source, out, "--merge", "--task", task, *options)
    build(source, out, "--merge", *options)


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "RANGE_TOKENS", 4000)


plans = st.integers(1, 5).flatmap(lambda n: st.permutations([f"{i}/{n}" for i in range(1, n + 1)]))


@settings(max_examples=6, phases=[Phase.generate])
@given(
    tasks=plans,
    packing=st.lists(st.sampled_from(["1/1", "1/2", "2/2", "2/3", "1/50"]), max_size=3),
    deduplicates=st.booleans(),
    others=st.lists(st.sampled_from(["1/2", "2/3", "4/4"]), max_size=2),
    workers=st.sampled_from([1, 1, 2]),
    begins=st.booleans(),
)
def test_any_tasks_in_any_order_make_the_bytes_of_one_process(
    corpus: Corpus,
    built: Path,
    unique: Path,
    tasks: list[str],
    packing: list[str],
    deduplicates: bool,
    others: list[str],
    workers: int,
    begins: bool,
) -> None:
    """Also if some of them are cut in another way, or come again."""
    options = ["--workers", workers, *(["--deduplicate"] if deduplicates else [])]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if begins:
            build(corpus[0], out, "--begin", *options)
        run_all(corpus[0], out, [*others, *tasks], *options, packing=packing)
        assert tree_digest(out) == tree_digest(unique if deduplicates else built)


@pytest.fixture(scope="module")
def unique(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the corpus without duplicates."""
    out = tmp_path_factory.mktemp("unique") / "out"
    build(corpus[0], out, "--deduplicate")
    return out


@given(total=st.integers(0, 40), of=st.integers(1, 9))
def test_shares_are_all_there_is_and_each_once(total: int, of: int) -> None:
    """Also where each task does all, and begins with its own."""
    shares = [TaskShare(index, of) for index in range(1, of + 1)]
    assert [n for share in shares for n in share.block(total)] == list(range(total))
    assert sorted(n for share in shares for n in share.numbers(total)) == list(range(total))
    for share in shares:
        order, own = share.first(range(total)), share.block(total)
        assert order[: len(own)] == list(own) and sorted(order) == list(range(total))


def test_a_run_without_merge_does_what_tasks_have_left(
    corpus: Corpus, built: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build(corpus[0], out, "--task", "2/3")
    with pytest.raises(UserError) as error:
        build(corpus[0], out, "--merge")
    assert "parts are not tokenized; run their tasks again, or this command without --merge" in str(
        error.value
    )
    build(corpus[0], out)
    assert tree_digest(out) == tree_digest(built)
    build(corpus[0], tmp_path / "again", "--task", "2/3")
    run_all(corpus[0], tmp_path / "again", ["1/3", "3/3"])
    assert tree_digest(tmp_path / "again") == tree_digest(built)


@pytest.mark.parametrize(
    "step", [["--task", "1/2"], ["--merge"], ["--merge", "--task", "1/2"], ["--begin"]]
)
def test_a_complete_output_stays_as_it_is(
    corpus: Corpus, built: Path, step: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    build(corpus[0], built, *step)
    assert capsys.readouterr().out == f"{built} is already complete\n"
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_nothing_to_merge(corpus: Corpus, tmp_path: Path) -> None:
    for share in ([], ["--task", "1/2"]):
        with pytest.raises(UserError, match=r"nothing is tokenized in .*: run its tasks first"):
            build(corpus[0], tmp_path / "out", "--merge", *share)
        assert not (tmp_path / "out").exists()
    run_all(corpus[0], tmp_path / "out", ["1/1"])


def test_a_source_without_text_is_refused_by_whoever_packs_first(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ")
    (tmp_path / "tokenizer.txt").write_text(text_of(1))
    build(tmp_path / "tokenizer.txt", tmp_path / "made", "--valid-fraction", 0)
    options = ["--tokenizer", tmp_path / "made" / "tokenizer.json"]
    out = tmp_path / "out"
    build(tmp_path / "a.txt", out, "--task", "1/1", *options)
    for step in (["--merge", "--task", "1/2"], ["--merge"]):
        with pytest.raises(UserError, match="has no usable document"):
            build(tmp_path / "a.txt", out, *step, *options)
    assert not out.exists()


def test_nothing_is_packed_before_all_is_tokenized(
    corpus: Corpus, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all is packed, a task leaves the rest to the merge."""
    out = tmp_path / "out"
    build(corpus[0], out, "--task", "1/2")
    with pytest.raises(UserError, match=r"7 of 14 parts are not tokenized; run their tasks again"):
        build(corpus[0], out, "--merge", "--task", "1/2")
    assert not list(out.glob(".work/packed/*"))
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.output.Manifest.write", fail)
        with pytest.raises(UserError, match="no luck"):
            run_all(corpus[0], out, ["2/2"])
    packed = {path: path.stat().st_mtime_ns for path in out.glob("train/*.tar")}
    build(corpus[0], out, "--merge", "--task", "1/2")
    assert {path: path.stat().st_mtime_ns for path in out.glob("train/*.tar")} == packed
    assert packed and not list(out.glob(".work/packed/*/splits/*/*.tar"))
    run_all(corpus[0], out, [])
    assert tree_digest(out) == tree_digest(built)


def test_a_finished_task_does_nothing_again(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spilled = counting(monkeypatch)
    build(corpus[0], tmp_path / "out", "--task", "2/3")
    parts = len(file_source(corpus[0]).parts())
    assert spilled == list(range(1, parts, 3))
    build(corpus[0], tmp_path / "out", "--task", "2/3")
    build(corpus[0], tmp_path / "out", "--task", f"{parts + 1}/{parts + 1}")
    assert len(spilled) == len(range(1, parts, 3))


def fail(*_: object) -> None:
    raise UserError("no luck")


def test_a_part_whose_runs_are_not_whole_is_made_again(
    corpus: Corpus, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build(corpus[0], out, "--task", "1/1")
    runs = sorted(out.glob(".work/runs/part-*.arrow"))
    runs[2].unlink()
    os.truncate(runs[5], runs[5].stat().st_size - 1)
    with pytest.raises(UserError, match=r"2 of .* parts are not tokenized"):
        build(corpus[0], out, "--merge")
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.shuffle.write_run", fail)
        with pytest.raises(UserError, match="2 of 14 parts of task 1/1 cannot be tokenized"):
            build(corpus[0], out, "--task", "1/1")
    assert len(failures(out / ".work" / "runs")) == 2, "they are no longer taken for finished"
    spilled = counting(monkeypatch)
    run_all(corpus[0], out, ["1/1"])
    assert sorted(spilled) == [2, 5]
    assert tree_digest(out) == tree_digest(built)


@pytest.mark.parametrize("task", ["0/2", "3/2", "1", "1/0", "a/2", "1/2/3", "-1/2", "1/1000000000"])
def test_what_is_no_task_is_refused(corpus: Corpus, tmp_path: Path, task: str) -> None:
    with pytest.raises(UserError, match=r"is not I/N with I from 1 to N"):
        build(corpus[0], tmp_path / "out", f"--task={task}")
    with pytest.raises(UserError, match="--begin is one step for all tasks: omit --task"):
        build(corpus[0], tmp_path / "out", "--begin", "--task", "1/2")


# Tasks at once.


def test_a_task_runs_once_at_a_time_and_not_beside_a_merge(
    corpus: Corpus, built: Path, tmp_path: Path
) -> None:
    output = Output(tmp_path / "out")
    build(corpus[0], output.folder, "--begin")
    with (
        output.locked(shared=True),
        output.locked_work(shared=True),
        output.locked_task(TaskShare(1, 2), "tokenizing"),
        output.locked_task(TaskShare(1, 2), "packing"),
    ):
        for step, name in (([], "tokenizing"), (["--merge"], "packing")):
            with pytest.raises(UserError, match=rf"task 1/2 is {name} in .* already: wait for it"):
                build(corpus[0], output.folder, "--task", "1/2", *step)
        for step in ([], ["--merge"], ["--begin"]):
            with pytest.raises(UserError, match=r"another run is writing .*out: wait for it"):
                build(corpus[0], output.folder, *step)
        build(corpus[0], output.folder, "--task", "2/2")
    with output.locked(), pytest.raises(UserError, match="another run is writing"):
        build(corpus[0], output.folder, "--task", "1/2")
    run_all(corpus[0], output.folder, ["1/2"])
    assert tree_digest(output.folder) == tree_digest(built)


def test_locks_of_files_do_where_those_of_folders_hold_on_one_host(
    corpus: Corpus, tmp_path: Path
) -> None:
    """As on NFS."""
    output = Output(tmp_path / "out")
    for shared in (True, False):
        with output.locked_work(shared):
            for step in (["--task", "1/1"], ["--merge"], []):
                if shared and "--task" in step:
                    continue
                with pytest.raises(UserError, match="another run, or a task, is writing"):
                    build(corpus[0], output.folder, *step)
        assert not output.folder.exists() or not list(output.folder.iterdir())


def test_tasks_that_start_together_train_the_same_tokenizer(
    corpus: Corpus, built: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [[*arguments(corpus[0], out, "--task", f"{i}/3")] for i in (1, 2, 3)]
    started = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, *w], cwd=ROOT, stdout=subprocess.DEVNULL)
        for w in words
    ]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    build(corpus[0], out, "--merge")
    assert tree_digest(out) == tree_digest(built)


def test_another_tokenizer_that_came_first_is_not_replaced(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def train(*_: object) -> bytes:
        (out / "tokenizer.json").write_bytes(b"another")
        return b"mine"

    monkeypatch.setattr("data_prep.beginning.train_tokenizer", train)
    with pytest.raises(UserError, match="with another tokenizer just now"):
        build(corpus[0], out, "--task", "1/2")
    assert (out / "tokenizer.json").read_bytes() == b"another"


def test_a_task_that_begins_with_other_settings_at_the_same_time_is_refused(
    corpus: Corpus, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at two revisions of the hub."""
    out = tmp_path / "out"
    options = ["--tokenizer", built / "tokenizer.json"]

    build(corpus[0], tmp_path / "other", "--begin", *options, "--seed", 1)

    def parts(*_: Any, real: Any = FileSource.parts_with_broken) -> Any:
        shutil.copytree(tmp_path / "other", out, dirs_exist_ok=True)
        return real(*_)

    monkeypatch.setattr(FileSource, "parts_with_broken", parts)
    with pytest.raises(UserError, match="was made with seed 1, not 0: choose another --out"):
        build(corpus[0], out, "--task", "1/2", *options)
    settings = Output(out).settings()
    assert settings is not None and settings.seed == 1
    assert not list(out.glob(".work/runs/*"))


# Tasks that are killed.

PROGRAM = """
import sys
from data_prep import ranges, shard
from data_prep.reading import files
from i3dist.cli.program import one_line_errors
files._SMALLEST_PART = ranges.RANGE_TOKENS = 4000
if __name__ == "__main__":
    with one_line_errors():
        shard.main(sys.argv[1:])
"""


DEADLY = """
import os
from data_prep import shuffle
def spill(self, part, number, real=shuffle.Spiller.spill):
    return os.kill(os.getpid(), 9) if number in (1, 3) else real(self, part, number)
shuffle.Spiller.spill = spill
"""


def test_tasks_killed_at_random_repeat_only_what_is_not_finished(
    corpus: Corpus, built: Path, tmp_path: Path
) -> None:
    rng = random.Random(5)
    out = tmp_path / "out"
    build(corpus[0], out, "--begin")
    killed, done = 0, set[str]()
    while len(done) < 3 or killed < 4:
        task = rng.choice(["1/3", "2/3", "3/3"])
        before = {p: p.stat().st_mtime_ns for p in out.glob(".work/runs/part-*.json")}
        words = arguments(corpus[0], out, "--task", task, "--workers", rng.choice([1, 2]))
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        try:
            status = process.wait(rng.uniform(0.3, 1.5) if killed < 4 else 60)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
            killed += 1
        if status == 0:
            done.add(task)
        else:
            assert status == -signal.SIGKILL
        assert {p: p.stat().st_mtime_ns for p in before} == before
    build(corpus[0], out, "--merge")
    assert tree_digest(out) == tree_digest(built)


KILLS_ITSELF = """
import os
from data_prep import pack
calls = iter(range(30))
def write_shard(*arguments, real=pack.write_shard):
    return real(*arguments) if next(calls, None) is not None else os.kill(os.getpid(), 9)
pack.write_shard = write_shard
"""


def test_tasks_that_pack_are_killed_and_meet_on_the_same_ranges(
    corpus: Corpus, built: Path, tmp_path: Path
) -> None:
    """What is packed is not packed again, and the merge finds nothing left to pack."""
    out = tmp_path / "out"
    build(corpus[0], out, "--task", "1/1")
    (tmp_path / "kills_itself.py").write_text(KILLS_ITSELF)

    def started(*options: object) -> subprocess.Popen[bytes]:
        words = arguments(corpus[0], out, "--merge", *options)
        command = [sys.executable, "-c", PROGRAM, *words]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)

    killed = started("--task", "1/2", "--extend", tmp_path / "kills_itself.py")
    assert killed.wait(60) == -signal.SIGKILL
    (folder,) = out.glob(".work/packed/*/ranges")
    packed = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert packed and list(folder.glob("../making/*")), "it was killed at work"
    both = [started("--task", "1/2"), started("--task", "2/3")]
    other = started("--task", "2/2", "--chunk-length", 32)  # other settings meanwhile
    assert [process.wait(60) for process in (*both, other)] == [0, 0, 0]
    assert {path: path.stat().st_mtime_ns for path in packed} == packed
    build(corpus[0], out, "--merge", "--task", "3/3")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*")}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("data_prep.output.Output.publish", fail)
        with pytest.raises(UserError, match="no luck"):
            build(corpus[0], out, "--merge")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*")} == before
    build(corpus[0], out, "--merge")
    assert tree_digest(out) == tree_digest(built)


@pytest.mark.parametrize(("workers", "attempts"), [(1, 3), (2, 1)])
def test_a_part_that_ends_its_process_keeps_no_other_from_being_done(
    corpus: Corpus, tmp_path: Path, workers: int, attempts: int
) -> None:
    """The task's own process begins with the others the next time; a worker is replaced."""
    out = tmp_path / "out"
    build(corpus[0], out, "--begin")
    parts = len(file_source(corpus[0]).parts())
    (tmp_path / "deadly.py").write_text(DEADLY)
    options = ["--task", "1/1", "--workers", workers, "--extend", tmp_path / "deadly.py"]
    words = [sys.executable, "-c", PROGRAM, *arguments(corpus[0], out, *options)]
    for _ in range(attempts):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        if workers == 1:
            assert done.returncode == -signal.SIGKILL
        else:
            assert done.returncode == 1
            assert "2 of 14 parts of task 1/1 cannot be tokenized" in done.stderr
            assert re.search(r"the worker process of part [13] died", done.stderr)
    assert len(list(out.glob(".work/runs/part-*.json"))) == parts - 2
    for number in (1, 3):
        (out / ".work" / "runs" / f".part-{number:06d}-run-000000.arrow.0f{PARTIAL}").touch()
    with pytest.raises(UserError, match=r"2 of .* not tokenized; a process ended while it read"):
        build(corpus[0], out, "--merge")
    build(corpus[0], out, "--task", "1/1")
    assert not failures(out / ".work" / "runs")
    assert not list(out.glob(f".work/runs/.*{PARTIAL}")), "nothing of killed processes is left"


# Broken files.


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files of every kind that make parts of their own, and small ones that share parts."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(8):
        lines = [json.dumps({"text": text_of(100 * number + n)}) + "\n" for n in range(20)]
        (folder / f"{number}.jsonl").write_text("".join(lines[: 2 if number % 2 else 20]))
    rows = [{"text": text_of(n)} for n in range(1000, 1060)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "3b.parquet", row_group_size=10)
    (folder / "5b.txt.gz").write_bytes(gzip.compress(text_of(2000).encode()))
    return folder


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


def break_line(path: Path) -> None:
    path.write_text(path.read_text().replace('"}\n', '"\n', 1))


def swell(path: Path) -> None:
    path.write_bytes(b"no parquet" * 999)


def spoil(path: Path) -> None:
    """Spoil a row group in the middle; the others can be read."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("0.jsonl", break_line),
        ("3.jsonl", break_line),
        ("3b.parquet", cut),
        ("3b.parquet", swell),
        ("3b.parquet", spoil),
        ("5b.txt.gz", cut),
    ],
)
def test_a_broken_file_costs_its_own_parts(
    source: Path,
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    """The others are done; when it is repaired, they are not done again."""
    options = ["--tokenizer", built / "tokenizer.json"]
    out = tmp_path / "out"
    good = (source / name).read_bytes()
    damage(source / name)
    parts = file_source(source).parts_with_broken()
    number = next(n for n, (_, found) in enumerate(file_source(source).files) if found == name)
    bad = [n for n, part in enumerate(parts) if number in part.files]
    told = []
    for task in ("2/2", "1/2"):
        try:
            build(source, out, "--task", task, *options)
        except UserError as error:
            told.append(str(error))
    assert len(told) == 1 and "repair or remove it; then run the same command again" in told[0]
    assert str(source / name) in told[0]
    assert len(list(out.glob(".work/runs/part-*.json"))) == len(parts) - 1
    with pytest.raises(UserError, match=rf"1 of {len(parts)} parts are not tokenized.*{name}"):
        build(source, out, "--merge", *options)
    (source / name).write_bytes(good)
    spilled = counting(monkeypatch)
    run_all(source, out, ["1/2", "2/2"], *options)
    assert sorted(spilled) == bad
    monkeypatch.undo()
    build(source, tmp_path / "whole", *options)
    assert tree_digest(out) == tree_digest(tmp_path / "whole")


@pytest.mark.parametrize("which", ["a", "b", "own"])
@pytest.mark.parametrize("damage", [break_line, swell])
def test_a_repair_costs_its_own_parts_where_there_are_several_sources(
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    damage: Callable[[Path], None],
) -> None:
    """Files lie in two sources, one with a weight, and in one for validation."""
    for place in ("a", "b", "own"):
        for number in range(8):
            documents = [f"{place} {number} {n} " * 20 for n in range(5)]  # some files to a part
            write(tmp_path / place / f"{number}.jsonl", documents)
    options: list[object] = ["--tokenizer", built / "tokenizer.json", "--source"]
    options += [f"{tmp_path / 'b'}:1.5", "--valid", tmp_path / "own"]
    out, path = tmp_path / "out", tmp_path / which / "1.jsonl"
    good = path.read_bytes()
    damage(path)
    with pytest.raises(UserError, match=rf"the others are done; the first: .*{which}/1\.jsonl"):
        build(tmp_path / "a", out, "--task", "1/1", *options)
    before = {path.name: path.read_bytes() for path in out.glob(".work/runs/part-*.json")}
    path.write_bytes(good)
    spilled = counting(monkeypatch)
    run_all(tmp_path / "a", out, ["1/2", "2/2"], *options)
    after = {int(name[5:11]) for name in before}
    assert spilled and not after & set(spilled)
    monkeypatch.undo()
    build(tmp_path / "a", tmp_path / "whole", *options)
    assert tree_digest(out) == tree_digest(tmp_path / "whole")


def test_a_file_that_was_read_may_not_become_another(
    source: Path, built: Path, tmp_path: Path
) -> None:
    options = ["--tokenizer", built / "tokenizer.json"]
    break_line(source / "4.jsonl")
    with pytest.raises(UserError, match=r"4\.jsonl"):
        build(source, tmp_path / "out", "--task", "1/1", *options)
    good = (source / "6.jsonl").read_bytes()
    (source / "6.jsonl").write_bytes(good + b"\n")
    with pytest.raises(UserError, match="from other content of the same source: choose another"):
        build(source, tmp_path / "out", "--task", "1/1", *options)
    (source / "6.jsonl").write_bytes(good)
    (source / "9.txt").write_text("more")
    with pytest.raises(UserError, match="from other content of the same source: choose another"):
        build(source, tmp_path / "out", "--task", "1/1", *options)


def heads(parts: Sequence[Part], *_: object, **__: object) -> Iterator[str]:
    """Stands for a sample of a large source: the first text of each part."""
    for part in parts:
        text = next(iter(part.records())).text
        yield text.decode() if isinstance(text, bytes) else str(text)


@pytest.mark.parametrize("first", ["", '{"text": "one that was not there before"}\n'])
def test_a_repair_where_the_tokenizer_was_trained_on_part_of_the_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """It stays if it would be the same now; otherwise it can be kept on request."""
    monkeypatch.setattr("data_prep.beginning.sample_texts", heads)
    out, path = tmp_path / "out", source / "4.jsonl"
    good = path.read_text()
    path.write_text(good[:-3])
    with pytest.raises(UserError, match=r"4\.jsonl, line 20: broken JSON"):
        build(source, out, "--task", "1/1")
    path.write_text(first + good)
    kept: list[object] = []
    if first:
        with pytest.raises(UserError, match="choose another --out, or delete it, or keep") as told:
            build(source, out, "--task", "1/1")
        advice = str(told.value).rpartition("or keep its tokenizer: ")[2].split()
        assert advice == ["--tokenizer", str(out / "tokenizer.json")]
        shutil.copy(out / "tokenizer.json", tmp_path)
        kept = advice
    spilled = counting(monkeypatch)
    run_all(source, out, ["1/1"], *kept)
    assert len(spilled) == 1
    build(source, tmp_path / "whole", *(["--tokenizer", tmp_path / "tokenizer.json"] * bool(kept)))
    assert tree_digest(out) == tree_digest(tmp_path / "whole")


# How parts stay what they are.


def part(*places: tuple[int, int, int]) -> FilePart:
    def span(file: int, start: int, stop: int) -> Span:
        source = SourceFile(path=Path("f"), name="f", number=file, state=(0, 0, 0))
        return Span(file=source, size=stop - start, start=start, stop=stop)

    return FilePart(tuple(span(*place) for place in places))


@st.composite
def cuts(draw: st.DrawFn, number: int) -> list[tuple[int, int, int]]:
    """A file that is cut into pieces."""
    ends = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=4)))
    return [(number, start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


@given(st.data())
def test_only_parts_of_files_that_are_cut_anew_change(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    then = [data.draw(cuts(number)) for number in range(count)]
    now = [data.draw(st.one_of(st.just(file), cuts(file[0][0]))) for file in then]

    def grouped(places: list[tuple[int, int, int]]) -> list[FilePart]:
        found: list[FilePart] = []
        while places:
            size = data.draw(st.integers(1, 3))
            found.append(part(*places[:size]))
            places = places[size:]
        return found

    former = grouped([place for file in then for place in file])
    fresh = grouped([place for file in now for place in file])
    arranged = Plan.of(former).arranged(fresh)
    assert len(arranged) == len(former)
    places = [place for one in arranged for place in one.places]
    assert sorted(places) == [place for file in now for place in file]
    assert all(list(one.places) == sorted(one.places) for one in arranged)
    recut = {number for number in range(count) if then[number] != now[number]}
    for old, new in zip(former, arranged, strict=True):
        if not old.files & recut:
            assert old.places == new.places
        assert new.files - recut == old.files - recut


def test_a_plan_of_other_files_changes_nothing() -> None:
    fresh = [part((0, 0, 5)), part((1, 0, 5))]
    assert Plan.of([part((0, 0, 5))]).arranged(fresh) == fresh
    doubled = [part((0, 0, 0), (0, 0, 0))]
    assert Plan.of([part((0, 0, 0)), part((0, 0, 0))]).arranged(doubled) == doubled
