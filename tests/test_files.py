"""Files that a user names: links, pipes and standard output stay what they are."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from i3dist.errors import UserError
from i3dist.files import check_writable, write_result

SAID = """
import sys
from pathlib import Path
from i3dist.files import printing_beside, write_result
print("before")
write_result(Path(sys.argv[1]), b"result\\n")
with printing_beside(Path(sys.argv[1])):
    print("a table")
print("after")
"""
RIGHTS = """
import os, sys
from pathlib import Path
from i3dist.errors import UserError
from i3dist.files import check_writable, write_result

def add(path, data):
    with path.open("ab") as file:
        file.write(data)

def works(call, *given):
    try:
        call(*given)
    except (OSError, UserError):
        return False
    return True

if os.getuid() == 0:  # who may do everything
    os.setgroups([])
    os.setuid(65534)
path, said = Path(sys.argv[1]), []
for appended, write in ((True, add), (False, write_result)):
    checked, before = works(check_writable, path, appended), os.path.lexists(path)
    said += [checked, works(write, path, b"x")]
    if not before and said[-1]:
        os.remove(os.path.realpath(path))
print(*said)
"""
CHECKED = """
import sys, time
from pathlib import Path
from i3dist.files import check_writable, write_result
check_writable(Path(sys.argv[1]))
time.sleep(0.2)
write_result(Path(sys.argv[1]), b"result")
"""


def test_a_result_goes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for content in (b"first", b"second"):
        write_result(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == content


def test_a_link_that_leads_to_itself_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        check_writable(tmp_path / "link")


def test_a_result_goes_into_a_pipe_that_was_checked_before(tmp_path: Path) -> None:
    """The reader of a pipe that is opened and closed would find its end before the result."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        try:
            # In a process of its own, which can be ended if it waits for a reader.
            subprocess.run([sys.executable, "-c", CHECKED, pipe], timeout=20, check=True)
            found, _ = reader.communicate(timeout=20)
        finally:
            reader.kill()
    assert found == b"result" and pipe.is_fifo()


@pytest.mark.parametrize("piped", [True, False])
def test_a_result_on_standard_output_is_whole(tmp_path: Path, piped: bool) -> None:
    """A file that the shell opened is not written from its begin again."""
    env = {**os.environ, "PYTHONUNBUFFERED": ""}  # which would print at once
    words = [sys.executable, "-c", SAID, "/dev/stdout"]
    with (tmp_path / "out").open("wb+") as file:
        out = subprocess.PIPE if piped else file
        done = subprocess.run(
            words, stdout=out, stderr=subprocess.PIPE, env=env, timeout=60, check=True
        )
    found = done.stdout if piped else (tmp_path / "out").read_bytes()
    assert (found, done.stderr) == (b"before\nresult\nafter\n", b"a table\n")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that other users can enter."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize(
    ("name", "written", "added"),
    [
        ("open/new", True, True),
        ("open/file", True, True),
        ("open/fixed", True, False),  # replaced, but not added to
        ("shut/new", False, False),
        ("shut/file", False, True),
        ("shut/fixed", False, False),
        ("open/to_file", True, True),  # links are written through
        ("open/to_fixed", False, False),
        ("shut/to_new", True, True),
        ("open/to_shut", False, False),
    ],
)
def test_the_rights_asked_for_are_those_needed(
    place: Path, name: str, written: bool, added: bool
) -> None:
    """Of a file that is replaced the folder's, of one that is added to its own."""
    for folder in ("open", "shut"):
        (place / folder).mkdir()
        for file, mode in (("file", 0o666), ("fixed", 0o444)):
            (place / folder / file).touch()
            (place / folder / file).chmod(mode)
    (place / "open" / "to_file").symlink_to("../shut/file")
    (place / "open" / "to_fixed").symlink_to("fixed")
    (place / "shut" / "to_new").symlink_to("../open/other")
    (place / "open" / "to_shut").symlink_to("../shut/other")
    (place / "open").chmod(0o777)
    (place / "shut").chmod(0o555)
    # In a process of its own, whose rights are fewer.
    words = [sys.executable, "-c", RIGHTS, place / name]
    done = subprocess.run(words, stdout=subprocess.PIPE, timeout=60, check=True, text=True)
    expected = [added, added, written, written]  # each as checked, and as done
    assert done.stdout.split() == list(map(str, expected))


def test_programs_that_check_the_same_new_file_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one checks, and writes, at every moment in between."""
    path, calls = tmp_path / "new", 0

    def between(call: Callable[..., Any]) -> Callable[..., Any]:
        def meet(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            monkeypatch.undo()
            check_writable(path)
            path.write_bytes(b"theirs")
            result = call(*given, **named)
            return result

        return meet

    for name in ("open", "close", "unlink"):
        path.unlink(missing_ok=True)
        monkeypatch.setattr(os, name, between(getattr(os, name)))
        check_writable(path)
        assert path.read_bytes() == b"theirs"
    assert calls == 3 and list(tmp_path.iterdir()) == [path]


def test_the_folder_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice can be followed: then the file can be written."""
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("far/away/file")
    Path("folder").symlink_to("aside")
    for name, lacking in {
        "none/file": "none",
        "sub/../file": "sub",
        "link": str(tmp_path / "far" / "away"),
        "folder/file": str(tmp_path / "aside"),
    }.items():
        for write in (check_writable, lambda path: write_result(path, b"result")):
            with pytest.raises(UserError, match=f"No such .*; make the folder {lacking}, or name"):
                write(Path(name))
        Path(lacking).mkdir(parents=True)
        check_writable(Path(name))
        write_result(Path(name), b"result")
        assert Path(name).read_bytes() == b"result"


def test_what_cannot_be_written_is_found_before(tmp_path: Path) -> None:
    """And what can be written stays as it was: there is no new file, or the earlier one."""
    other = "name another file"
    for name, says in {
        ".": f"cannot be written: Is a directory; {other}",
        "x" * 300: f"cannot be written: File name too long; {other}",
        "none/file": f"cannot be written: No such .*; make the folder .*none, or {other}",
        "old/file": f"cannot be written: Not a directory; {other}",
    }.items():
        (tmp_path / "old").write_bytes(b"content")
        for write in (check_writable, lambda path: write_result(path, b"result")):
            with pytest.raises(UserError, match=says):
                write(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("new", "old", "link"):
        check_writable(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "link"}
    assert (tmp_path / "old").read_bytes() == b"content" and (tmp_path / "link").is_symlink()
