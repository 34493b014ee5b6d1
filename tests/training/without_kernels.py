"""i3dist.training.precompile, but torch compiles functions to calls of its operators: no C++.

A kernel takes a compiler of C++ 4 s. The last word names a file, to which a line is added for each
function that this process took.
"""

import sys

import torch._inductor.config

from i3dist.ops import compiled
from i3dist.training import precompile

if __name__ == "__main__":
    torch._inductor.config.fallback_by_default = True
    taken = sys.argv.pop()
    precompile.main()
    with open(taken, "a") as file:
        file.writelines(f"{function.code.co_qualname}\n" for function in compiled.prepared)
