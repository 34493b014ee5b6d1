"""data_prep/show.py knows what a real run of two ranks has read."""

from pathlib import Path

from i3dist.training.ledger import read
from tests.conftest import STEPS, program


def test_show_agrees_with_ledger_and_checkpoint_of_a_run(whole: Path, data: Path) -> None:
    """The program refuses if the ledger's hash or the data's fingerprint differs."""
    assert len(read(whole)) == STEPS
    for step, state in ((STEPS, "in the ledger"), (STEPS + 1, "not in the ledger")):
        words = ["--step", step, "--lane", 3, "--run", whole]
        result = program("data_prep/show.py", data, *words)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"{whole}: step {step}, lane 3: {state}\n")
    result = program("data_prep/show.py", data, "--document", "#0", "--run", whole)
    assert "epoch 1, step " in result.stdout, result.stderr
