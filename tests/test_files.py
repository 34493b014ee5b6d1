"""Files that a user names: links, pipes and standard output stay what they are."""

import os
import subprocess
import sys
from pathlib import Path

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


def test_what_cannot_be_written_is_found_before(tmp_path: Path) -> None:
    """And what can be written stays as it was: there is no new file, or the earlier one."""
    other = "name another file"
    for name, says in {
        ".": f"cannot be written: Is a directory; {other}",
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
    assert {path.name for path in tmp_path.iterdir()} == {"old", "link", "target"}
    assert (tmp_path / "old").read_bytes() == b"content" and (tmp_path / "link").is_symlink()
