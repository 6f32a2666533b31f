"""Fixtures that several files share."""

from __future__ import annotations

import pytest
import torch

from tests.fake_files import OTHER, ROW, FakeDocument
from wnconvert import files


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    """Outputs of two networks are near each other but for a few draws. The property tests draw their own numbers."""
    torch.manual_seed(0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeDocument]:
    """Make the fake format the only one there is. Set the attributes of the class to make it fail."""
    monkeypatch.setattr(files, "FORMATS", (ROW, OTHER))
    for name in ("damage", "failure", "outputs", "companion"):
        monkeypatch.setattr(FakeDocument, name, None)
    return FakeDocument
