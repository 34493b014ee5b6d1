"""How long each part of a start takes, from the command to the end of the first step."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from i3dist.ops import compiled

# Of a compilation: all of it, Inductor's part, and of that the wait for kernels.
MICROSECONDS = ("duration_us", "inductor_cumulative_compile_time_us", "triton_compile_time_us")
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run")


class StartTimes:
    """The parts of this rank's start, in their order, and their seconds."""

    def __init__(self) -> None:
        """Begin where this process began, and its launcher, if it has one."""
        self.parts: dict[str, float] = {}
        self.wanted = False  # whether to print them
        self.on_end: Callable[[], None] = lambda: None  # called when a part but the last ends
        self._under_way = True
        self._last = psutil.Process().create_time()
        if launched := self._last - command_began(self._last):
            self.parts["launcher"] = launched

    def end(self, part: str) -> None:
        """A part ends now; it began where the one before it ended. Nothing after the start."""
        if self._under_way:
            now = time.time()
            self.parts[part] = self.parts.get(part, 0.0) + now - self._last
            self._last = now
            self.on_end()

    def end_all(self) -> bool:
        """A step is done: of the first one, print the parts if they are wanted, and return True."""
        if not self._under_way:
            return False
        self.on_end = lambda: None
        self.end("first step")
        self._under_way = False
        if self.wanted:
            self.show()
        return True

    def show(self) -> None:
        """Print the parts, and what was compiled."""
        title = "time until the first step"
        table = Table(title=title, min_width=len(title))
        table.add_column("part")
        table.add_column("s", justify="right")
        for part, seconds in (*self.parts.items(), ("all", sum(self.parts.values()))):
            table.add_row(part, f"{seconds:.1f}")
        console = Console(width=100)
        console.print(table)
        if (compiled := compilations()) is not None:
            console.print(compiled)


def command_began(default: float) -> float:
    """When the launcher that started this process began; `default` if there is none."""
    with suppress(psutil.Error):  # processes of others may be hidden
        for parent in psutil.Process().parents():
            words = parent.cmdline()[:4]
            if not any(Path(word).name.startswith(LAUNCHERS) for word in words):
                break
            default = parent.create_time()
    return default


def compilations() -> Table | None:
    """Seconds of each function that was loaded or compiled in this process; None if none was.

    `get_compilation_metrics` is torch's own, but not public: without it there is no table. It gives
    graphs that were found or compiled for functions that are kept whole no name, so these are
    rows of their own, and the others count in the last row alone.
    """
    utils: Any = sys.modules.get("torch._dynamo.utils")
    measured = utils.get_compilation_metrics() if hasattr(utils, "get_compilation_metrics") else []
    if not measured:  # loading measures something, too
        return None
    counts, above = utils.counters["inductor"], utils.counters["aot_autograd"]
    found = {
        "kernels": (counts["fxgraph_cache_hit"], counts["fxgraph_cache_miss"]),
        "gradient": (above["autograd_cache_hit"], above["autograd_cache_miss"]),
    }
    caches = ", ".join(f"{what} {hits} of {hits + more}" for what, (hits, more) in found.items())
    table = Table(title="compiled graphs", caption=f"from the cache: {caches}")
    for heading in ("function", "what", "s", "inductor", "kernels"):
        table.add_column(heading, justify="left" if heading in ("function", "what") else "right")
    rows = [[(getattr(one, name) or 0) / 1e6 for name in MICROSECONDS] for one in measured]
    kept = [one for one in compiled.prepared if one.how != "traced"]
    whole = [one.seconds for one in kept]
    for one in kept:
        name = _name(one.code.co_filename, one.code.co_name)
        table.add_row(name, one.how, f"{one.seconds:.1f}")
    names = {one.compile_id: _name(one.co_filename, one.co_name) for one in measured if one.co_name}
    for one, row in zip(measured, rows, strict=True):
        if one.compile_id in names:
            direction = "forward" if one.is_forward else "backward"
            table.add_row(names[one.compile_id], direction, *(f"{s:.1f}" for s in row))
            whole.append(row[0])
    table.add_section()
    _, *parts = (sum(column) for column in zip(*rows, strict=True))
    table.add_row("all", "", *(f"{s:.1f}" for s in (sum(whole), *parts)))
    return table


def _name(file: str | None, function: str) -> str:
    """A function with the file that it is in: "rwkv.forward"."""
    return f"{Path(file or '').stem}.{function}"
