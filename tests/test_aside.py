"""Processes that a program starts beside itself."""

from pathlib import Path

import pytest

from i3dist.aside import start_module


def test_a_module_is_this_programs_and_not_the_working_directorys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what another copy's code compiles would be kept as this one's."""
    (tmp_path / "i3dist").mkdir()
    (tmp_path / "i3dist" / "__init__.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    process = start_module("i3dist.garbage", environ={})
    process.communicate(timeout=60)
    assert process.returncode == 0
