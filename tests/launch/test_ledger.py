"""launch/ledger.py: two runs are compared to the tolerance that is given."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from i3dist.errors import UserError
from tests.launch.conftest import load, typed


def ledger_of(folder: Path, losses: list[float]) -> Path:
    """A run's ledger with these losses."""
    folder.mkdir()
    entries = [
        {"step": n, "samples": f"s{n}", "lanes": f"l{n}", "loss": loss, "gradient_norm": 1.0}
        for n, loss in enumerate(losses, start=1)
    ]
    lines = [
        json.dumps(entry | {"skipped": "spike" if entry["step"] == 2 else None})
        for entry in entries
    ]
    (folder / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def ledgers(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Of two runs whose second steps differ by 1%."""
    yield ledger_of(tmp_path / "one", [4.0, 2.0]), ledger_of(tmp_path / "other", [4.0, 2.02])


@pytest.mark.parametrize(
    ("words", "says"),
    [([], "step 2 differs in loss"), (["--tolerance", "0.005"], "step 2 differs in loss")],
)
def test_ledger_compares_to_the_tolerance(
    ledgers: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    module = load("ledger")
    typed(monkeypatch, *ledgers, *words)
    with pytest.raises(UserError, match=says):
        module.main()
    assert capsys.readouterr().out == f"{ledgers[0]}: unbroken, 2 steps, 1 skipped\n"
    typed(monkeypatch, *ledgers, "--tolerance", "0.02")
    module.main()
    assert capsys.readouterr().out.splitlines()[-1] == f"{ledgers[1]}: the same steps"
