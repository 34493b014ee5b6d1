"""Starting CUDA while Python imports torch: half a second on a slow host. No torch here."""

import ctypes
import os
from collections.abc import MutableMapping

from i3dist.aside import aside

DRIVER = "libcuda.so.1"


def start_driver(wanted: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Begin to start the driver and a context on the first GPU, in a thread. torch finds them.

    Args:
        wanted: the device, as `devices.pick_device` takes it; nothing is started for "cpu".
        environ: DS_ACCELERATOR in it may choose the CPU too.
    """
    if wanted != "cpu" and environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        aside(_start, "start CUDA")


def _start() -> None:
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return  # there is no GPU
    if driver.cuInit(0) == 0:
        # torch's context of a device is this one, and it says what is wrong, if something is.
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0)
