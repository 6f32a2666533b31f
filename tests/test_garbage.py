"""Importing without looking for garbage leaves the collector as it was."""

from __future__ import annotations

import gc

import pytest

from wnconvert.garbage import unwatched


def enabled_meanwhile() -> bool:
    with unwatched():
        if gc.isenabled():
            return True
        raise ImportError("no such module")


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError):
            enabled_meanwhile()
        assert gc.isenabled() == enabled
        assert not gc.get_freeze_count()
    finally:
        (gc.enable if before else gc.disable)()


def test_what_somebody_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with unwatched():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
