"""Python's garbage collector while a program starts.

Imports and the compiler's tracing make a million objects, and nearly all of them stay. Looking at
them again and again takes a fifth of the time, and a collection during training would look at them
once more (docs/decisions.md has the measurement).
"""

import gc


def pause() -> None:
    """Collect nothing until `resume`."""
    gc.disable()


def keep() -> None:
    """If the collector is paused, let it pass over all objects that exist now, for good."""
    if not gc.isenabled():
        gc.freeze()


def resume(collect: bool = True) -> None:
    """If the collector is paused, collect what is garbage, keep the rest, and go on.

    Without `collect` garbage stays, and nothing waits.
    """
    if not gc.isenabled():
        if collect:
            gc.collect()
        gc.freeze()
        gc.enable()
