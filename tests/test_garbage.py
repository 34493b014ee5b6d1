"""The garbage collector while a program starts."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from i3dist import garbage


class Circle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def collector() -> Iterator[None]:
    """As it was before."""
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_until_the_start_is_over(collector: None) -> None:
    """Then what is garbage goes, and what is not is never looked at again."""
    garbage.pause()
    assert not gc.isenabled()
    garbage.keep()
    kept, circle = Circle(), weakref.ref(Circle())
    assert circle() is not None
    garbage.resume()
    assert gc.isenabled() and circle() is None
    assert not any(one is kept for one in gc.get_objects()) and gc.get_freeze_count()


def test_a_collector_that_was_not_paused_is_left_alone(collector: None) -> None:
    """In a program that calls the trainer itself."""
    frozen = gc.get_freeze_count()
    garbage.keep()
    garbage.resume()
    assert gc.isenabled() and gc.get_freeze_count() == frozen
