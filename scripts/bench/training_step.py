"""Time one training step of a split layer against the plain layer and against torch's parametrization."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from timing import medians, print_ratios
from torch import Tensor, nn

import wnconvert

LAYERS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("Linear(1024, 1024), 32 rows", lambda: nn.Linear(1024, 1024), (32, 1024)),
    ("Linear(1024, 1024), 512 rows", lambda: nn.Linear(1024, 1024), (512, 1024)),
    ("Conv1d(256, 256, 7), 4 x 200", lambda: nn.Conv1d(256, 256, 7, padding=3), (4, 256, 200)),
    ("Conv2d(128, 128, 3), 8 x 16 x 16", lambda: nn.Conv2d(128, 128, 3, padding=1), (8, 128, 16, 16)),
]


def step(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """One step of plain gradient descent."""
    optimizer = torch.optim.SGD(module.parameters(), 1e-4)

    def run() -> None:
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()

    return run


def main() -> None:
    """Print one line per layer: times as multiples of the plain layer's."""
    torch.manual_seed(0)
    for title, build, shape in LAYERS:
        plain, x = build(), torch.randn(shape)
        split = wnconvert.apply(copy.deepcopy(plain)).model
        theirs = nn.utils.parametrizations.weight_norm(copy.deepcopy(plain))
        times = medians({"plain": step(plain, x), "wnconvert": step(split, x), "torch": step(theirs, x)})
        print_ratios(title, times, "plain")


if __name__ == "__main__":
    main()
