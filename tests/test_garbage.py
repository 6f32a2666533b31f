"""Not looking for garbage for a while leaves the collector as it was."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from wnconvert.garbage import lasting, unwatched

Pause = Callable[[], AbstractContextManager[None]]


def enabled_meanwhile(pause: Pause) -> bool:
    with pause():
        if gc.isenabled():
            return True
        raise ImportError("no such module")


@pytest.mark.parametrize("pause", [lasting, unwatched])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled: bool, pause: Pause) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError):
            enabled_meanwhile(pause)
        assert gc.isenabled() == enabled
        assert not gc.get_freeze_count()
    finally:
        (gc.enable if before else gc.disable)()


def test_what_somebody_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with lasting():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_what_may_be_garbage_later_stays_young() -> None:
    gc.collect()
    with unwatched():
        made = [[] for _ in range(1000)]
        assert gc.get_count()[0] >= 1000
    ages = {id(found) for found in gc.get_objects(generation=2)}
    assert not any(id(found) in ages for found in made)
