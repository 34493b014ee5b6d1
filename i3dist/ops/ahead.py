"""Compiling our own Triton kernels in threads, while torch's compiler traces what calls them.

Triton compiles a kernel when it is first called: 24 s of processor time for those of a training
step, in which everything else would wait. The compiler has asked for the shapes of their results
long before that, so it is known what they will be called with.
"""

import atexit
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from i3dist.ops.compiled import is_noting

Form = TypeVar("Form", bound=Callable[..., object])

_begun: dict[tuple[Any, ...], threading.Thread] = {}  # by form and inputs
_one_at_a_time: defaultdict[Any, threading.Lock] = defaultdict(threading.Lock)  # by form
_skipped: set[Any] = set()  # forms that another process compiles
_ending = threading.Event()


def compile_ahead(form: Callable[..., object], *inputs: Any) -> None:
    """Begin to compile the kernel that `form` launches, if `inputs` are on a GPU.

    Args:
        form: launches the kernel; for tensors of device "meta" it only compiles it (`launch`).
        inputs: its arguments, trees with tensors whose contents do not matter.
    """
    if is_noting() or form in _skipped:
        return
    leaves, tree = pytree.tree_flatten(inputs)
    device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
    described = [
        (*leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves
    ]
    if device.type != "cuda" or any(isinstance(x, torch.SymInt) for x in chain(*described)):
        return
    key = (form, device, str(tree), *described)
    if key not in _begun:
        work = partial(_compile, form, device, described, tree)
        _begun[key] = threading.Thread(target=work, name="kernel", daemon=True)
        _begun[key].start()


def wait_for(form: Form) -> Form:
    """`form`, once what was begun for it is done."""
    for key in [key for key in _begun if key[0] == form]:
        if thread := _begun.pop(key, None):
            thread.join()
    return form


def skip(form: Callable[..., object]) -> None:
    """Begin nothing more for `form`: another process compiles its kernel."""
    _skipped.add(form)


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor) -> Callable[..., object]:
    """What launches a Triton kernel, or only compiles it if `like` is of device "meta"."""
    return partial(kernel.warmup, grid=grid) if like.is_meta else kernel[grid]


def _compile(
    form: Callable[..., object],
    device: torch.device,
    described: list[tuple[Any, ...]],
    tree: pytree.TreeSpec,
) -> None:
    # Calls that differ in the number of rows share a kernel: the second finds it compiled.
    with _one_at_a_time[form], suppress(Exception):  # who calls the kernel sees what is wrong
        if _ending.is_set():
            return
        torch.cuda.set_device(device)  # Triton keeps kernels by device
        leaves = [
            torch.empty(x[:-1], dtype=x[-1], device="meta")
            if isinstance(x[-1], torch.dtype)
            else x[0]
            for x in described
        ]
        form(*pytree.tree_unflatten(leaves, tree))


@atexit.register
def _stop() -> None:
    """Begin nothing more, and wait: a process must not end inside of a compiler."""
    _ending.set()
    for thread in _begun.values():
        thread.join()
