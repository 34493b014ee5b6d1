"""What the CUDA driver is asked without torch, whose import takes seconds.

Starting CUDA takes half a second on a slow host; `start_driver` does it while torch is imported.
"""

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


def count_gpus() -> int:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES shows; 0 without a driver that works."""
    driver, count = _initialized(), ctypes.c_int()
    if driver is not None:
        driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def _initialized() -> ctypes.CDLL | None:
    """The driver; None if there is none, or no GPU."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _start() -> None:
    driver = _initialized()
    if driver is not None:
        # torch's context of a device is this one, and it says what is wrong, if something is.
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0)
