"""What Triton calls a compiled kernel does not depend on what a process did before."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT

MODULES = sorted(
    path for path in ROOT.glob("i3dist/**/*.py") if "triton.jit" in path.read_text("utf-8")
)
KEYS = """
import importlib, random, sys
import triton
seed, names = int(sys.argv[1]), sys.argv[2:]
mix = random.Random(seed).shuffle
mix(names)
modules = [importlib.import_module(name) for name in names]
kernels = [
    (f"{module.__name__}.{name}", value)
    for module in modules
    for name, value in vars(module).items()
    if isinstance(value, triton.JITFunction)
]
mix(kernels)
print(sorted((name, kernel.cache_key) for name, kernel in kernels))
"""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_module_with_kernels_computes_their_keys_last(path: Path) -> None:
    assert ast.unparse(ast.parse(path.read_text("utf-8")).body[-1]) == "compute_keys(globals())"


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_keys_do_not_depend_on_the_order_of_calls() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    found = {
        subprocess.run(
            [sys.executable, "-c", KEYS, str(seed), *names],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        for seed in range(3)
    }
    assert len(found) == 1
