"""Variables and caches that DeepSpeed and Triton read."""

import os
import subprocess
import sys
from pathlib import Path

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
