"""How long work may take: what was seen of its kind decides, never less than a floor."""

from hypothesis import example, given
from hypothesis import strategies as st

from i3dist.distributed.patience import STEP, Patience

SECONDS = st.floats(0, 1e5)
WORKS = st.lists(st.tuples(st.sampled_from([STEP, "validating", "saving"]), SECONDS), max_size=40)


def after(setting: float | str, works: list[tuple[str, float]]) -> Patience:
    patience = Patience(setting)  # type: ignore[arg-type]
    for work, seconds in works:
        patience.saw(work, seconds)
    return patience


@given(number=st.floats(0, 1e6), works=WORKS)
def test_a_number_is_the_limit_of_all_work(number: float, works: list[tuple[str, float]]) -> None:
    patience = after(number, works)
    assert {patience.limit(work) for work in (STEP, "validating", "never seen")} == {number}
    assert patience.endless == (number == 0)


@given(steps=st.lists(SECONDS, min_size=45, max_size=55))
@example(steps=[0.0] * 9 + [1000.0] + [0.0] * 40)
@example(steps=[0.0] * 10 + [1000.0] + [0.0] * 39)
def test_steps_have_a_limit_of_their_own_once_50_were_seen(steps: list[float]) -> None:
    """The first 10, which compile, do not raise it."""
    limit = after("auto", [(STEP, seconds) for seconds in steps]).limit(STEP)
    if len(steps) < 50:
        assert limit == 1800
    else:
        assert limit == max(60, 10 * max(steps[10:]))


@given(works=WORKS)
def test_other_work_has_half_an_hour_until_it_was_seen(works: list[tuple[str, float]]) -> None:
    patience = after("auto", works)
    for kind in ("validating", "saving", "rolling back"):
        seen = [seconds for work, seconds in works if work == kind]
        assert patience.limit(kind) == (max(300, 10 * max(seen)) if seen else 1800)
