"""What a rank says when the job hangs: its stacks, and its last exchanges with other ranks."""

import faulthandler
import os
import pickle
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d

from i3dist.distributed.devices import uses_cuda
from i3dist.distributed.job import Job

STDERR = 2  # the process's own, whatever stands in for sys.stderr
# In the run's folder, followed by the rank. `torchfrtrace --prefix flight_record_rank_ RUN`, a
# program of torch's, compares the ranks'.
FILE = "flight_record_rank_"
# Begins the name of the file to which torch writes it if NCCL's own time-out comes first.
TORCH_FILE = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"


def keep_records_in(run: Path) -> None:
    """Have torch write its flight record to the run's folder. For before the process group."""
    os.environ.setdefault(TORCH_FILE, str(run / FILE))


def report(line: str, job: Job, run: Path) -> None:
    """Print a line, this rank's stacks and its last collective; the run's folder gets the record.

    Each is one write, so that the ranks' reports do not mix. It may block: call it in a thread.
    """
    with suppress(OSError):
        _print(f"{line}; its stacks:\n".encode() + _stacks())
    record = _record()
    if record is None:
        return
    path = run / f"{FILE}{job.rank}"
    with suppress(OSError):
        _print(f"rank {job.rank}: {_last(record)}; all: {path}\n".encode())
        path.write_bytes(pickle.dumps(with_groups(record, job.world_size)))


def _print(text: bytes) -> None:
    os.write(STDERR, text)


def _stacks() -> bytes:
    """Of all threads."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read() + b"\n"


def _record() -> dict[str, Any] | None:
    """torch's flight recorder: this rank's last collectives. None if it has no entry."""
    dump = getattr(_distributed_c10d, "_dump_nccl_trace" if uses_cuda() else "_dump_fr_trace", None)
    pickled = dump() if dump is not None else b""
    record: dict[str, Any] = pickle.loads(pickled) if pickled else {}
    return record if record.get("entries") else None


def with_groups(record: dict[str, Any], ranks: int) -> dict[str, Any]:
    """A record that names every group of its entries, of all ranks: torchfrtrace needs that.

    torch (2.13) leaves them out with gloo.
    """
    groups = {
        name: {"name": name, "desc": description, "ranks": str(list(range(ranks)))}
        for name, description in (entry["process_group"] for entry in record["entries"])
    }
    return {**record, "pg_config": groups | record["pg_config"]}


def _last(record: Mapping[str, Any]) -> str:
    """The collective that runs, or else the newest, in words."""
    entries = record["entries"]
    last = next((entry for entry in entries if entry["state"] == "started"), entries[-1])
    sizes = ", ".join(map(str, last["input_sizes"]))
    name = last["profiling_name"].split(":")[-1]
    return f"its last collective is {name} {last['collective_seq_id']} of {sizes}, {last['state']}"
