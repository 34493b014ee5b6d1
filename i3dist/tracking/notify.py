"""Telling people of a run: events.jsonl in its folder, and a command of theirs (tracking.notify).

The command is run by a process that watches rank 0's, so that it also hears of a death without a
word: `python -m i3dist.tracking.notify` with rank 0's process id and the command, and a JSON line
on standard input for each event. It imports nothing that takes long.
"""

import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

from i3dist.aside import start_module
from i3dist.distributed.held_signals import SIGNALS, release
from i3dist.errors import printable, warned
from i3dist.tracking import prometheus
from i3dist.tracking.metrics_log import EVENTS, METRICS, MetricsLog, read_lines

Event = Literal["start", "requeue", "failure", "end"]
LAST: tuple[Event, ...] = ("requeue", "failure", "end")  # after these the process ends
WAIT_SECONDS = 10.0  # that the end of a run waits for the command
LEAVE_SECONDS = 2.0  # the same, where other ranks have ended and Slurm is about to end this one
LIMIT_SECONDS = 60.0  # after which the command is ended
LOOK_SECONDS = 0.5
DATA_WAIT = "wait"  # an event of events.jsonl alone: a rank waits for data
DATA_WAIT_SECONDS = 60.0  # so long, and after each further such time, it is told
UNSAID = "the process of rank 0 ended without a word: the job's log may say why"


class Notifier:
    """Tells of the events of a run, on rank 0; on other ranks it does nothing. Never raises."""

    def __init__(self, folder: Path, command: str | None, active: bool = True) -> None:
        """Watch this process from now on, if there is a `command`.

        Args:
            folder: the run's.
            command: what to run at each event; None runs nothing.
            active: whether this is rank 0.
        """
        self._folder, self._active = folder, active
        self._first_end = threading.Lock()  # never released
        self.telling: threading.Thread | None = None  # of a wait
        self._told_of_wait = -math.inf  # when it last was
        self._step: Callable[[], int] | None = None  # steps taken, once the run has begun
        self._watcher: subprocess.Popen[bytes] | None = None
        if active and command is not None:
            with warned("tracking.notify"):
                self._watcher = _start_watcher(folder, command)

    @property
    def _begun(self) -> bool:
        """Whether the folder is this run's: before, another may hold it."""
        return self._step is not None

    def start(self, step: Callable[[], int]) -> None:
        """The run begins to train; `step` returns how many steps it has taken by now."""
        self._step = step
        self._tell("start", "")

    def waits(self, seconds: float, what: str) -> None:
        """A rank waits for data, and has done so for `seconds`; may be called at any rate."""
        now = time.monotonic()
        if not self._active or min(seconds, now - self._told_of_wait) < DATA_WAIT_SECONDS:
            return
        if self.telling is not None and self.telling.is_alive():
            return
        self._told_of_wait = now
        # In a thread, because a file system or a terminal that hangs would block the caller.
        thread = threading.Thread(target=self._tell_of_wait, args=(what,), daemon=True)
        self.telling = thread
        thread.start()

    def _tell_of_wait(self, what: str) -> None:
        if not self._first_end.locked():  # the last event is how the run ended
            with warned("events"):
                print(f"warning: {what}", file=sys.stderr, flush=True)
            self._append(DATA_WAIT, what)

    def leave(self, reason: str, again: bool) -> None:
        """Other ranks end this process; `again` says whether the job asks to be started again."""
        self.stop("requeue" if again else "failure", reason, LEAVE_SECONDS)

    def stop(self, event: Event, reason: str = "", wait: float | None = None) -> None:
        """The process is about to end: the first call tells why.

        Args:
            event: one of `LAST`.
            reason: in words.
            wait: seconds to wait for the command; None takes `WAIT_SECONDS`.
        """
        if not self._active or not self._first_end.acquire(blocking=False):
            return
        self._tell(event, reason)
        if self._begun:
            prometheus.mark_stopped(self._folder)
        watcher, self._watcher = self._watcher, None
        if watcher is not None and watcher.stdin is not None:
            with suppress(OSError, subprocess.TimeoutExpired):
                watcher.stdin.close()
                watcher.wait(WAIT_SECONDS if wait is None else wait)

    def _tell(self, event: Event, reason: str) -> None:
        if not self._active:
            return
        line = self._append(event, reason)
        if self._watcher is not None and self._watcher.stdin is not None:
            with suppress(OSError):
                self._watcher.stdin.write(json.dumps(line).encode() + b"\n")
                self._watcher.stdin.flush()

    def _append(self, event: str, reason: str) -> dict[str, Any]:
        """Add an event to events.jsonl, if the run has begun."""
        step = 0 if self._step is None else self._step()
        line = {"event": event, "host": socket.gethostname(), "reason": reason}
        if self._begun:
            with warned("events"):
                MetricsLog(self._folder / EVENTS).append(step, line)
        return {"step": step, "time": time.time(), **line}


def _start_watcher(folder: Path, command: str) -> subprocess.Popen[bytes]:
    words, environ = (str(os.getpid()), command), {"I3DIST_RUN": str(folder.absolute())}
    # A session of its own: a signal to the job's process group is not for it.
    return start_module("i3dist.tracking.notify", *words, environ=environ, start_new_session=True)


def main() -> None:
    """Watch the process of rank 0, and run the command at each event."""
    for number in (*SIGNALS, signal.SIGINT):  # launchers end the children of a rank too
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN not inherited by the command
    release()  # what rank 0 holds
    parent, command = int(sys.argv[1]), sys.argv[2]
    last: Mapping[str, Any] = {}
    for message in _messages(sys.stdin.buffer, parent):
        last = message
        _run(command, message)
    if last.get("event") not in LAST:
        _run(command, {**last, "step": _last_reported(last), "event": "failure", "reason": UNSAID})


def _last_reported(start: Mapping[str, Any]) -> int:
    """The last step that the run has reported since its start, the event; or the start's."""
    steps = [int(start.get("step", 0))]
    if start:  # else the run has not begun, and the folder may be another's
        with suppress(OSError):
            lines = read_lines(Path(os.environ["I3DIST_RUN"]) / METRICS)
            steps += [int(line["step"]) for line in lines if line.get("time", 0) >= start["time"]]
    return steps[-1]


def _messages(stream: IO[bytes], parent: int) -> Iterator[dict[str, Any]]:
    """Lines of the stream, until it or the parent ends: data readers hold it open for longer."""
    waiting = b""
    while True:
        ready = select.select([stream], [], [], LOOK_SECONDS)[0]
        if ready:
            found = os.read(stream.fileno(), 65_536)
            if not found:
                return
            *lines, waiting = (waiting + found).split(b"\n")
            yield from map(json.loads, lines)
        elif os.getppid() != parent:
            return


def _run(command: str, message: Mapping[str, Any]) -> None:
    told = {
        f"I3DIST_{name.upper()}": printable(message.get(name, ""))
        for name in ("event", "step", "reason", "host")
    }
    try:
        # Its own session, so that all of it can be ended.
        process = subprocess.Popen(
            ["sh", "-c", command],
            env=os.environ | told,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        status = process.wait(LIMIT_SECONDS)
        if status:
            _warn(f"the command ended with status {status}")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _warn(f"the command took over {LIMIT_SECONDS:.0f} s, and was ended")
    except OSError as error:
        _warn(f"{error}")


def _warn(what: str) -> None:
    with suppress(OSError, ValueError):
        print(f"warning: tracking.notify: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
