"""Large blocks of memory go back to the system when they are freed."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, psutil
from i3dist import heap
if "keep_no_large_blocks" in sys.argv:
    heap.keep_no_large_blocks()
held = lambda: psutil.Process().memory_info().rss
first = bytearray(20 << 20)
del first
large, small = bytearray(20 << 20), [bytes(600) for _ in range(20000)]
before = held()
del large
if "give_back" in sys.argv:
    heap.give_back()
print(round((before - held()) / (1 << 20)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library should be glibc")
@pytest.mark.parametrize(
    "called, freed", [("nothing", 0), ("keep_no_large_blocks", 20), ("give_back", 20)]
)
def test_large_blocks_are_given_back(called: str, freed: int) -> None:
    words = [sys.executable, "-c", SCRIPT, called]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert abs(int(result.stdout) - freed) <= 2
