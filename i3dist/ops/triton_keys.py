"""Keys under which Triton keeps compiled kernels, made the same in every process."""

from collections.abc import Mapping
from typing import Any

import triton


def compute_keys(names: Mapping[str, Any]) -> None:
    """Have Triton compute the keys of a module's functions; a module's last line calls this.

    In Triton 3.6 a kernel's key depends on whether a function that it calls got its own before: on
    which kernel a process launches first, and on threads. Under another key what is compiled is not
    found, and a start compiles it once more. In the order of their definition, functions are before
    what calls them.

    Args:
        names: the module's `globals()`.
    """
    for value in names.values():
        if isinstance(value, triton.JITFunction):
            value.cache_key  # noqa: B018
