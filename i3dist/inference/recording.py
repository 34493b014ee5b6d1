"""Work on fixed tensors, replayed as a CUDA graph: one launch instead of one for each kernel."""

from collections.abc import Callable

import torch


class Recorded:
    """Calls one function, which reads and writes the same tensors every time.

    The first call runs as it is, and compiles what is to be compiled; the second is recorded. From
    then on the recording is replayed.

    The function is given with each call and not kept: it is often a method of what holds this, and
    memory in such a cycle would wait for Python's collector.
    """

    def __init__(self, recorded: bool):
        """`recorded` false, as on the CPU, leaves every call as it is."""
        self.recorded = recorded
        self.graph: torch.cuda.CUDAGraph | None = None
        self.called = False

    @torch.no_grad()
    def __call__(self, call: Callable[[], None]) -> None:
        """Call the function, which is the same every time."""
        if not self.recorded:
            call()
        elif not self.called:
            self._on_another_stream(call)
            self.called = True
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    call()
            self.graph.replay()

    @staticmethod
    def _on_another_stream(call: Callable[[], None]) -> None:
        """As PyTorch asks for before recording."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
