"""Work on fixed tensors, replayed as a CUDA graph: one launch instead of one for each kernel."""

from collections.abc import Callable

import torch


class Recorded:
    """Calls a function that reads and writes the same tensors every time.

    The first call runs as it is, and compiles what is to be compiled; the second is recorded. From
    then on the recording is replayed.
    """

    def __init__(self, call: Callable[[], None], recorded: bool):
        """`recorded` false, as on the CPU, leaves every call as it is."""
        self.call, self.recorded = call, recorded
        self.graph: torch.cuda.CUDAGraph | None = None
        self.called = False

    @torch.no_grad()
    def __call__(self) -> None:
        """Call it."""
        if not self.recorded:
            self.call()
        elif not self.called:
            self._on_another_stream()
            self.called = True
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.call()
            self.graph.replay()

    def _on_another_stream(self) -> None:
        """As PyTorch asks for before recording."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.call()
        torch.cuda.current_stream().wait_stream(stream)
