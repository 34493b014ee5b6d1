"""Which checkpoint is taken, and which are kept: pure rules over names."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.checkpoint import store
from i3dist.config import CheckpointSettings
from i3dist.errors import UserError
from i3dist.files import clear_partials, write_whole

STEPS = st.sets(st.integers(1, 60), max_size=12)


@given(there=STEPS, newest=st.integers(1, 60), keep=st.integers(1, 4), every=st.integers(0, 9))
def test_the_newest_and_every_so_many_th_stay(
    there: set[int], newest: int, keep: int, every: int
) -> None:
    there |= {newest}
    stay = store.kept(there, newest, CheckpointSettings(keep=keep, keep_every=every))
    assert newest in stay
    assert stay <= {step for step in there if step <= newest}
    for step in there:
        later = sum(step < other <= newest for other in there)
        named = every > 0 and step % every == 0
        assert (step in stay) == (step <= newest and (later < keep or named))


@given(there=STEPS, needed=STEPS, newest=st.integers(1, 60), keep=st.integers(1, 4))
def test_what_is_needed_is_not_pushed_out_by_what_is_not(
    there: set[int], needed: set[int], newest: int, keep: int
) -> None:
    retention = CheckpointSettings(keep=keep)
    stay = store.kept(there, newest, retention, needed.__contains__)
    past = sorted(step for step in there if step <= newest)
    assert stay == {*past[-keep:], *[step for step in past if step in needed][-keep:]}


@given(there=STEPS, latest=st.none() | st.integers(1, 60), broken=STEPS)
def test_the_newest_whole_one_up_to_latest_is_taken(
    there: set[int], latest: int | None, broken: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in there:
        store.place(folder, step).mkdir()
    if latest is not None:
        (folder / "latest").write_text(f"step-{latest:08d}\n")
    whole = {step for step in there - broken if latest is None or step <= latest}

    def fault(path: Path) -> str | None:
        return None if path.is_dir() and store.step_of(path) not in broken else "broken"

    candidates = store.candidates(folder)
    if whole:
        path, refused = store.first_whole(candidates, fault)
        assert path == store.place(folder, max(whole))
        better = {s for s in there | {latest or 0} if max(whole) < s <= (latest or 99)}
        assert len(refused) == len(better)
    elif candidates:
        with pytest.raises(UserError, match="no whole one is left"):
            store.first_whole(candidates, fault)
    else:
        assert store.first_whole(candidates, fault) == (None, [])


KINDS = st.sampled_from(["folder", "link", "link to nothing", "link to a file", "file"])


@settings(deadline=None)  # it writes files, and disks can be busy
@given(there=st.dictionaries(st.integers(1, 9), KINDS), new=st.integers(1, 9))
def test_links_are_followed_to_read_and_only_taken_away_themselves(
    there: dict[int, str], new: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever has a checkpoint's name: writing and pruning never fail on it, nor go through it."""
    place = tmp_path_factory.mktemp("place")
    disk, folder = place / "disk", place / "checkpoints"
    (disk / "run").mkdir(parents=True)
    folder.symlink_to(disk / "run")
    for step, kind in there.items():
        path, other = store.place(folder, step), disk / f"somebody's {step}"
        if kind == "folder":
            path.mkdir()
        elif kind == "file":
            path.write_text("x")
        else:
            path.symlink_to(other)
        if kind == "link":
            other.mkdir()
            (other / "state.json").write_text("precious")
        if kind == "link to a file":
            other.write_text("precious")
    linked = sorted(path.name for path in disk.rglob("*") if "somebody's" in path.parts[-1])
    target = store.place(folder, new)
    store.staging(target).symlink_to(disk)  # somebody else's work
    store.stage(store.staging(target))
    (store.staging(target) / "state.json").write_text("new")
    store.publish(store.staging(target), target)
    store.prune(folder, new, CheckpointSettings(keep=1), lambda _: True)
    assert store.steps(folder) == [new] and store.candidates(folder) == [target]
    assert (target / "state.json").read_text() == "new" and not target.is_symlink()
    assert {path.name for path in folder.iterdir()} == {target.name, "latest"}
    assert sorted(path.name for path in disk.iterdir() if path.name != "run") == linked
    assert all(path.read_text() == "precious" for path in disk.glob("somebody's*/*"))


def test_checkpoints_on_a_disk_that_is_not_there_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "no disk")
    with pytest.raises(UserError, match=r"link to .*no disk, which is not there: bring it back"):
        store.candidates(tmp_path / "checkpoints")


@pytest.mark.parametrize("text", ["", "nonsense", "../../etc", "step-1", "\xff"])
def test_a_latest_that_says_nothing_leaves_the_choice_to_the_names(
    tmp_path: Path, text: str
) -> None:
    for step in (5, 70):
        store.place(tmp_path, step).mkdir()
    (tmp_path / "step-00000900.bak").mkdir()
    (tmp_path / "latest").write_text(text, encoding="latin-1")
    assert store.candidates(tmp_path) == [store.place(tmp_path, step) for step in (70, 5)]


def test_names_sort_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        store.place(tmp_path, step).mkdir()
    assert store.steps(tmp_path) == [100_000_000, 99_999_999]


def test_a_write_that_fails_leaves_the_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "latest", b"old")

    def fail(path: Path) -> None:
        raise OSError("full")

    monkeypatch.setattr("i3dist.files.sync", fail)
    with pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "latest", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    assert (tmp_path / "latest").read_bytes() == b"old"


def test_only_what_is_unfinished_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.partial" / "deep").mkdir(parents=True)
    (tmp_path / ".latest.77.partial").touch()
    for name in (".lock", "step-00000001", "latest"):
        (tmp_path / name).touch()
    clear_partials(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "step-00000001", "latest"}
