"""One short round of the soak test: `python -m tests.faults.soak` goes on. About a minute."""

from pathlib import Path

import pytest

from tests.faults.soak import Soak, misbehaviour


def test_ended_at_random_a_run_is_the_undisturbed_one(data: Path, tmp_path: Path) -> None:
    soak = Soak(data, tmp_path, seed=3, steps=16, endings=2)
    soak.train_undisturbed()
    soak.round()
    assert soak.ended.total() == 2 and soak.continued > 0


@pytest.mark.parametrize(
    ("said", "saved", "now", "wrong"),
    [
        ("continued from step 4\nstep  5/40  loss 6.1\n", 4, 4, None),
        ("continued from step 4\nstopped on request at step 6: run the same", 4, 6, None),
        ("step  1/40  loss 6.1\n", 0, 0, None),
        ("", 4, 4, None),
        ("Traceback (most recent call last):\n", 4, 4, "a traceback"),
        ("continued from step 4\n", 4, 2, "the checkpoint of step 4 is gone"),
        ("continued from step 2\nstep  3/40  loss 6.1\n", 4, 4, "did not go on from step 4"),
        ("step  1/40  loss 6.1\n", 4, 4, "did not go on from step 4"),
        (
            "stopped on request at step 6: run the same",
            4,
            4,
            "stopped at step 6 and had saved step 4",
        ),
    ],
)
def test_what_a_job_must_not_do_is_seen(said: str, saved: int, now: int, wrong: str | None) -> None:
    seen = misbehaviour(said, saved, now)
    assert seen is None if wrong is None else wrong in str(seen)
