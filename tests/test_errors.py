"""i3dist/errors.py, streams.py: what goes wrong is one line, whatever the streams are. 5 s."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from i3dist import errors
from i3dist.cli import streams
from i3dist.cli.program import DEBUG
from i3dist.errors import UserError
from tests.conftest import ROOT

HEAD = """
import os, sys
from i3dist import errors
from i3dist.cli import streams
from i3dist.cli import program
from i3dist.cli.program import one_line_errors
from i3dist.errors import UserError
"""


def run(
    text: str, shell: str = '"$@"', result: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the body of a program; `shell` says how, `result` whether its output is its result."""
    body = "".join(f"    {line}\n" for line in text.strip().splitlines())
    script = f"{HEAD}\nwith one_line_errors({result}):\n{body}"
    return subprocess.run(
        [
            "bash",
            "-c",
            f"set -o pipefail; {shell}",
            "bash",
            sys.executable,
            "-c",
            f"exec({script!a})",
        ],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        errors="surrogateescape",
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    return line


def traceback_of(line: str) -> str:
    """What the file holds that a line names; it is removed."""
    file = Path(line.rpartition("the traceback is in ")[2])
    text = file.read_text()
    file.unlink()
    return text


CHARACTERS = """
from rich.console import Console
from rich.table import Table
table = Table(title="─ 漢")
table.add_column("é")
table.add_row("字 \\udce9")
Console().print(table)
Console(stderr=True).print(table)
print("漢 \\udce9")
print("漢 \\udce9", file=sys.stderr)
raise UserError("漢 is wrong")
"""


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:surrogateescape"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "utf-8"},
        {"PYTHONIOENCODING": "utf-16", "PYTHONUNBUFFERED": "1"},
    ],
    ids=str,
)
def test_any_character_can_be_printed_to_any_encoding(variables: dict[str, str]) -> None:
    result = run(CHARACTERS, result=True, **variables)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr + result.stdout
    assert "Error" not in result.stderr.replace("\0", "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-", ">&- 2>&-"])
def test_a_closed_stream_changes_nothing_and_no_file_takes_its_place(
    tmp_path: Path, closed: str
) -> None:
    text = f"""
file = open({str(tmp_path / "file")!r}, "w")
print("to standard output", flush=True)
print("to standard error", file=sys.stderr, flush=True)
os.system("echo of a child; echo of a child >&2")
file.write("its own")
file.close()
sys.exit(7)
"""
    result = run(text, f'"$@" {closed}')
    assert result.returncode == 7
    assert "Error" not in result.stderr
    assert (tmp_path / "file").read_text() == "its own"


LONG = """
for number in range(20_000):  # more than a pipe holds, however late its reader leaves
    print("line", number, flush=True)
open(sys.argv[1], "w").write("to the end")
"""
# A reader that leaves at once, a full disk.
GONE = ['"$@" {file} | head -n 1', '"$@" {file} > /dev/full']


@pytest.mark.parametrize("shell", GONE)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_lost_output_ends_no_work_and_costs_one_line(
    tmp_path: Path, shell: str, unbuffered: str
) -> None:
    file = tmp_path / "file"
    result = run(LONG, shell.format(file=file), PYTHONUNBUFFERED=unbuffered)
    assert (result.returncode, file.read_text()) == (0, "to the end")
    assert re.fullmatch("warning: standard output: .*; the program goes on\n", result.stderr), (
        result.stderr
    )


def test_a_program_whose_result_is_its_output_ends_with_its_reader(tmp_path: Path) -> None:
    """As other tools do: by SIGPIPE, without a word."""
    result = run(LONG, GONE[0].format(file=tmp_path / "file"), result=True)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("text", ["print('result')", "print('result'); sys.exit(0)"])
def test_a_result_that_cannot_be_written_is_an_error(text: str) -> None:
    line = one_line(run(text, '"$@" > /dev/full', result=True))
    assert line == "error: standard output: No space left on device"
    needing = f"streams.require_output(); {text}"
    assert "standard output: closed" in one_line(run(needing, '"$@" >&-', result=True))
    # What the message says to do.
    assert run(needing, '"$@" >/dev/null', result=True).returncode == 0


def test_a_reader_that_is_slow_gets_all(tmp_path: Path) -> None:
    """Also where another program has made the pipe non-blocking, and Python would raise."""
    text = "os.set_blocking(1, False)\nprint('x' * 300_000)"
    result = run(text, '"$@" | (sleep 0.5; cat)')
    assert (len(result.stdout), result.stderr) == (300_001, "")


UNFORESEEN = {
    "TypeError('a\\nb')": "unexpected TypeError: a;",
    "KeyError('key')": "unexpected KeyError: 'key';",
    "MemoryError()": "unexpected MemoryError;",
    "RecursionError('deep')": "unexpected RecursionError: deep;",
    "UnicodeDecodeError('utf-8', b'\\xe9', 0, 1, 'bad')": "unexpected UnicodeDecodeError: ",
    "ConnectionResetError(104, 'reset by peer')": "error: reset by peer;",
    "AssertionError('x' * 5000)": "unexpected AssertionError: xxx",
    "ExceptionGroup('some', [ValueError(1)])": "unexpected ExceptionGroup: some",
    "type('PanicException', (BaseException,), {})('of Rust')": "unexpected PanicException: of",
    "type('Silent', (Exception,), {'__str__': lambda _: 'a \\udce9 \\x1b'})()": "Silent: a ? ?",
}


@pytest.mark.parametrize(("raised", "says"), UNFORESEEN.items())
def test_what_nobody_foresaw_is_one_line_that_names_its_traceback(raised: str, says: str) -> None:
    line = one_line(run(f"raise {raised}"))
    assert line.startswith("error: ") and says in line and len(line) < 500
    text = traceback_of(line)
    assert text.lstrip(" +|").startswith(("Traceback", "Exception Group Traceback"))
    assert "<module>" in text


def test_a_debugger_sees_the_traceback_at_once() -> None:
    for raised in ("ValueError('unforeseen')", "UserError('foreseen')"):
        result = run(f"raise {raised}", **{DEBUG: "1"})
        assert result.returncode == 1
        assert "Traceback" in result.stderr and raised.partition("(")[0] in result.stderr
        if "the traceback is in" in result.stderr:
            traceback_of(result.stderr.strip())


@pytest.mark.parametrize("number", ["0", "3"])
def test_each_rank_has_a_file_of_its_own_in_the_folder_that_was_named(
    tmp_path: Path, number: str
) -> None:
    text = f"""
import pathlib
program.OTHERS_WAIT_SECONDS = 0
program.keep_tracebacks_in(pathlib.Path({str(tmp_path)!r}))
raise ValueError
"""
    lines = [one_line(run(text, RANK=number)) for _ in range(2)]
    assert all(line.startswith("[rank 3] error" if number == "3" else "error") for line in lines)
    files = sorted(tmp_path.iterdir())
    assert sorted(line.rpartition(" ")[2] for line in lines) == list(map(str, files))
    assert len(files) == 2 and all(f"rank{number}" in file.name for file in files)


def test_where_no_folder_takes_the_traceback_the_line_says_how_to_see_it() -> None:
    text = """
import tempfile
def refuse(*_): raise OSError(30, "Read-only file system")
tempfile.mkstemp = refuse
raise ValueError("odd")
"""
    line = one_line(run(text))
    assert line.startswith("error: unexpected ValueError: odd; no folder takes")
    assert "I3DIST_DEBUG=1 prints it" in line
    assert "Traceback" in run(text, I3DIST_DEBUG="1").stderr


def test_a_thread_that_fails_is_one_line_and_ends_nothing() -> None:
    text = """
import threading
def fail(): raise ValueError("in a thread")
thread = threading.Thread(target=fail, name="watch")
thread.start(); thread.join()
print("on")
"""
    result = run(text)
    assert (result.returncode, result.stdout) == (0, "on\n")
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: thread watch: unexpected ValueError: in a thread; ")
    assert "in fail" in traceback_of(line)


def test_what_a_destructor_raises_is_told_to_a_debugger_only() -> None:
    text = """
class Odd:
    def __del__(self): raise ValueError("odd")
odd = Odd(); del odd
print("on")
"""
    result = run(text)
    assert (result.returncode, result.stdout, result.stderr) == (0, "on\n", "")
    assert "ValueError: odd" in run(text, I3DIST_DEBUG="1").stderr


def test_what_fails_in_another_process_is_one_line_too() -> None:
    text = """
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
context = multiprocessing.get_context("fork")
with ProcessPoolExecutor(1, context) as pool:
    pool.submit(int, "x").result()
"""
    line = one_line(run(text))
    assert "unexpected ValueError: invalid literal for int()" in line
    traceback_of(line)
    # As a torch loader hands over what failed in one of its processes.
    text = """
raise ValueError("Caught ValueError in process 0.\\nOriginal Traceback (most recent):\\n x\\nkey 5")
"""
    line = one_line(run(text))
    assert "ValueError: Caught ValueError in process 0. key 5;" in line
    traceback_of(line)


def test_streams_that_are_somebodys_own_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    streams.prepare(output_is_result=False)
    assert (sys.stdout, sys.stderr) == before


def test_what_decides_nothing_costs_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (ValueError("a\nb"), OSError(28, "full", "f"), UserError("said"), MemoryError()):
        with errors.warned("no plots"):
            raise error
    assert capsys.readouterr().out.splitlines() == [
        "warning: no plots: ValueError: a",
        "warning: no plots: f: full",
        "warning: no plots: said",
        "warning: no plots: MemoryError",
    ]
    with pytest.raises(KeyboardInterrupt), errors.warned("no plots"):
        raise KeyboardInterrupt
