"""Variables and caches that DeepSpeed and Triton read."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from torch._inductor.config import decide_compile_threads

from i3dist.engine import toolchain


def test_where_no_home_can_be_written_kernels_are_kept_elsewhere(tmp_path: Path) -> None:
    """In a folder of the process's own; a place that the user chose stands."""
    environ = {"HOME": str(tmp_path)}
    toolchain.writable_caches(environ)
    assert environ == {"HOME": str(tmp_path)} and (tmp_path / ".triton" / "cache").is_dir()
    for home in ("/proc/nohome", "/dev/null"):
        for chosen in ({"HOME": home}, {"HOME": str(tmp_path), "TRITON_HOME": home}):
            environ = dict(chosen)
            toolchain.writable_caches(environ)
            cache = Path(environ["TRITON_CACHE_DIR"])
            assert cache.stat().st_mode & 0o777 == 0o700
            cache.rmdir()
    environ = {"HOME": "/proc/nohome", "TRITON_CACHE_DIR": "/chosen"}
    toolchain.writable_caches(environ)
    assert environ["TRITON_CACHE_DIR"] == "/chosen"


def test_what_deepspeed_stumbles_over_fails_no_import_and_stays_in_the_environment() -> None:
    """So that a line can say what is wrong with it."""
    wrong = {"DEEPSPEED_TIMEOUT": "10m", "DS_ACCELERATOR": "gpu"}
    script = (
        "import i3dist.engine.setup, os; print(*(os.environ[name] for name in os.sys.argv[1:]))"
    )
    words = [sys.executable, "-c", script, *wrong]
    result = subprocess.run(words, env=os.environ | wrong, capture_output=True, text=True)
    assert result.stdout.split() == list(wrong.values()), result.stderr


def test_modules_are_imported_aside_and_their_errors_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    reader, writer = os.pipe()
    turn = "import os, sys; turn = sys.getswitchinterval()"
    (tmp_path / "aside_waits.py").write_text(f"{turn}; os.read({reader}, 1)")
    (tmp_path / "aside_fails.py").write_text("raise ValueError('of the module')")
    wait = toolchain.import_aside("aside_waits")
    os.write(writer, b".")  # only now can the module be imported
    wait()
    usual = sys.getswitchinterval()
    assert sys.modules["aside_waits"].turn == pytest.approx(usual / 10)
    with pytest.raises(ValueError, match="of the module"):
        toolchain.import_aside("aside_fails")()
    assert sys.getswitchinterval() == usual
    os.close(reader), os.close(writer)


@pytest.mark.parametrize(("cores", "chosen", "workers"), [(4, "", 4), (64, "", 32), (4, "9", 9)])
def test_a_rank_has_a_compile_worker_for_each_of_its_cores(
    cores: int, chosen: str, workers: int
) -> None:
    """tests/test_imports.py shows that torch has not read the number before."""
    with mock.patch.dict(os.environ):
        os.environ.pop("TORCHINDUCTOR_COMPILE_THREADS", None)
        if chosen:
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = chosen
        toolchain.set_up_compiler(cores)
        assert decide_compile_threads() == workers


TWICE = """
import gc, sys
import torch
from i3dist.config import Settings
from i3dist.distributed.job import Job
from i3dist.engine import compile_cache
from i3dist.engine.toolchain import set_up_compiler
from i3dist.ops.cross_entropy import token_losses

set_up_compiler(1)
_, wait = compile_cache.enter(Settings(), Job.detect({}))
wait()
looked = []
gc.callbacks.append(lambda *_: looked.append(1))
gc.disable()
for _ in range(2):
    torch._dynamo.reset()
    hidden, head = torch.ones(2, 4, requires_grad=True), torch.ones(8, 4)
    torch.compile(token_losses, dynamic=False)(hidden, head, torch.zeros(2).long()).sum().backward()
found = torch._dynamo.utils.counters["aot_autograd"]
print(found["autograd_cache_bypass"], found["autograd_cache_miss"], found["autograd_cache_hit"])
print(len(looked))
"""


@pytest.mark.parametrize(("chosen", "found"), [(False, "0 2 2"), (True, "2 1 1")])
def test_all_graphs_of_a_start_are_found_again_and_no_garbage_is_looked_for(
    tmp_path: Path, chosen: bool, found: str
) -> None:
    """Also one with a `torch.autograd.Function`: on a GPU every block has one, its LayerNorm.

    But not in a folder that the user chose: its name has no hash of our operators, so such a graph
    would also be found after they have changed.
    """
    environ = {n: v for n, v in os.environ.items() if not n.startswith(("TOR", "TRI", "PYTEST"))}
    environ["TMPDIR"] = str(tmp_path)
    if chosen:
        environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "chosen")
    words = [sys.executable, "-c", TWICE]
    done = subprocess.run(words, env=environ, capture_output=True, text=True)
    assert done.stdout.splitlines() == [found, "0"], done.stderr
