"""Fixtures that several files share."""

from __future__ import annotations

import pytest

from tests.fake_files import OTHER, ROW, FakeDocument
from wnconvert import files


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeDocument]:
    """Make the fake format the only one there is. Set the attributes of the class to make it fail."""
    monkeypatch.setattr(files, "FORMATS", (ROW, OTHER))
    for name in ("damage", "failure", "outputs", "companion"):
        monkeypatch.setattr(FakeDocument, name, None)
    return FakeDocument
