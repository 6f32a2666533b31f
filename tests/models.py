"""Real trained models, taken from the packages of the `models` extra."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest


def model_file(distribution: str, path: str) -> Path:
    """Return a file of an installed package, or skip the test if the package is not installed."""
    try:
        found = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed: run scripts/fetch_models")
    if not found.exists():
        pytest.skip(f"{distribution} is installed but has no {path}")
    return found
