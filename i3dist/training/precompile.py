"""Compiling a training step by several processes at once, while the run starts.

A first start compiles a dozen functions. That takes one process a minute or more, mostly in Python,
which uses one core. So other processes compile them while the run's own imports, builds the model
and starts its engine. Each runs the step once on tensors without contents, as Python, to note which
functions it calls with what; then each takes functions that no other has taken. The run loads what
they kept (`i3dist.ops.compiled`), and compiles by itself whatever is missing.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i3dist.aside import start_module
from i3dist.config import Settings
from i3dist.distributed import devices
from i3dist.engine.flat_parameters import FlatModel
from i3dist.errors import reason, warned
from i3dist.model.layers import Channels
from i3dist.model.lm import I3LM, Unfilled
from i3dist.model.state import LaneState
from i3dist.ops import ahead, compiled
from i3dist.ops.cross_entropy import call_kernels
from i3dist.ops.wkv import compile_wkv, form_of
from i3dist.optim.optimizers import build
from i3dist.training.micro_batch import dummy_batch

MOST_PROCESSES = 6
CORES = 3  # of a process, at least: it compiles kernels in processes of its own
THREADS = "TORCHINDUCTOR_COMPILE_THREADS"  # of a rank, as `set_up_compiler` or the user sets it
FAULT = "fault-"  # a file in which a process says what went wrong
MOST_SECONDS = 200  # until this process does without the others
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What the functions of a training step are compiled for."""

    model: dict[str, Any]  # settings
    optimizer: dict[str, Any]  # settings
    ranks: int
    window_chunks: int
    lanes: int  # of a micro-batch
    joins: bool  # whether `I3LM.join_softmaxes` is called
    dtype: str  # of the parameters, as "bfloat16"
    device: str  # of this rank, as torch writes it
    bos_id: int
    pad_id: int

    @property
    def settings(self) -> Settings:
        """As far as they matter here."""
        train = {"window_chunks": self.window_chunks}
        return Settings.build({"model": self.model, "optimizer": self.optimizer, "train": train})


def compile_aside(step: Step, folder: Path, cores: int) -> None:
    """Have processes compile the step's functions, unless that was tried; wait until they end.

    Args:
        step: to be compiled.
        folder: where functions are kept (`compiled.keep_in`).
        cores: of this rank.
    """
    count = min(MOST_PROCESSES, cores // CORES)
    text = json.dumps(asdict(step))
    done = folder / f"step-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if count < 2 or done.exists():
        return
    with warned("compiling in several processes"), tempfile.TemporaryDirectory() as taken:
        threads = max(1, int(os.environ.get(THREADS, cores)) // count)
        started = [_start(text, folder, taken, threads) for _ in range(count)]
        end = time.monotonic() + MOST_SECONDS
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(end - time.monotonic())
            process.kill()
        statuses = [process.wait() for process in started]
        if any(statuses):
            said = [path.read_text() for path in Path(taken).glob(f"{FAULT}*")][:1]
            why = ": ".join([f"exit statuses {statuses}", *said])
            _log.info("compiling in several processes failed, so this one compiles: %s", why)
        folder.mkdir(parents=True, exist_ok=True)
        done.touch()  # also if they failed: they would again, as where a GPU is for one process


def _start(text: str, folder: Path, taken: str, threads: int) -> subprocess.Popen[bytes]:
    words, environ = (str(folder), taken), {THREADS: str(threads)}
    quiet = subprocess.DEVNULL
    process = start_module(
        "i3dist.training.precompile", *words, environ=environ, stdout=quiet, stderr=quiet
    )
    assert process.stdin is not None
    with suppress(OSError):  # it has ended
        process.stdin.write(f"{text}\n".encode())
        process.stdin.flush()  # it stays open: the process ends when this one does
    return process


def functions(step: Step) -> dict[Path, Callable[[], object]]:
    """The functions of forward and backward, in the order in which they are called.

    Returns:
        What `compiled.noting` yields.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports torch's compiler

    settings, device, dtype = step.settings, torch.device(step.device), getattr(torch, step.dtype)
    with Unfilled(meta=True):
        model = I3LM(settings.model, step.bos_id)
    flat_model = FlatModel(model)
    sizes = [flat.parameter.numel() for flat in flat_model.flats]
    with FakeTensorMode(), compiled.noting() as noted:
        flats = [torch.empty(n, dtype=dtype, device=device, requires_grad=True) for n in sizes]
        for name, parameter in flat_model.unpack(*flats).items():
            _put(model, name, parameter)
        for name, buffer in model.named_buffers():
            _put(model, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
        model.compile_blocks()
        if step.joins:
            model.join_softmaxes(0.0)
        state = LaneState.empty(step.lanes, settings.model, device, dtype)
        tokens, *others = dummy_batch(settings, state, step.pad_id)
        model(tokens, tokens, *others)
        with torch.no_grad():
            hidden = torch.empty(tokens.numel(), model.width.computed, dtype=dtype, device=device)
            call_kernels(hidden, model.head.computed(model.head.weight), tokens.flatten())
        update(step, sizes)
    return noted


def update(step: Step, sizes: list[int]) -> None:
    """Call the optimizer's step on a rank's parts of tensors of so many elements."""
    settings, device = step.settings.optimizer, torch.device(step.device)
    weights = [torch.empty(part_size(n, step.ranks), device=device) for n in sizes]
    for weight in weights:
        weight.requires_grad_().grad = torch.empty_like(weight)
    optimizer: Any = build([[weight] for weight in weights], settings, compiled=True)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(2, device=device)
    optimizer.step()


def part_size(elements: int, ranks: int) -> int:
    """Elements of a flat tensor that DeepSpeed's ZeRO-2 gives each rank, padding included."""
    return -(-elements // (2 * ranks)) * 2


def share_kernels(step: Step, taken: Path) -> None:
    """Compile those of RWKV's kernels that no other process has taken: backward takes longest of
    all, so it begins before torch's compiler is imported."""
    model, device = step.settings.model, torch.device(step.device)
    if "rwkv" not in model.layer_kinds:
        return
    width, dtype = Channels(model.d_model).computed, getattr(torch, step.dtype)
    for backward in (True, False):
        form = form_of(device, backward)
        if _take(taken / f"wkv-{backward}"):
            compile_wkv(model.chunk_length, width, dtype, device, backward)
            ahead.wait_for(form)
        ahead.skip(form)


def _put(model: I3LM, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    held: dict[str, Any] = module._parameters if own in module._parameters else module._buffers
    held[own] = tensor


def _take(path: Path) -> bool:
    """Whether no other process has taken what a file stands for."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _end_with(parent: Any) -> None:
    """End this process when the one that started it does."""
    parent.read()
    os._exit(1)


def main() -> None:
    """Compile functions of the step that standard input describes in its first line."""
    folder, taken = map(Path, sys.argv[1:])
    try:
        compile_share(folder, taken)
    except Exception as error:
        Path(taken, f"{FAULT}{os.getpid()}").write_text(reason(error))
        sys.exit(1)


def compile_share(folder: Path, taken: Path) -> None:
    """Compile what no other process has taken; arguments are those of `_start`."""
    from torch.nn.attention import flex_attention

    step = Step(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    devices.make_current(torch.device(step.device))  # as in the run
    compiled.keep_in(folder)
    share_kernels(step, taken)
    # Otherwise torch first compiles attention in order to run it as Python.
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    for path, prepare in reversed(functions(step).items()):  # attention takes longest
        if _take(taken / path.name):
            prepare()


if __name__ == "__main__":
    main()
