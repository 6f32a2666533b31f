"""Time several functions in turns and compare medians, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def medians(functions: Mapping[str, Callable[[], object]], runs: int = 9) -> dict[str, float]:
    """Median seconds of each function over `runs` rounds, after one round that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(runs + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def print_ratios(title: str, times: Mapping[str, float], peer: str) -> None:
    """One line: what was measured, and each time as a multiple of the peer's."""
    ratios = "  ".join(f"{name} {seconds / times[peer]:.2f}" for name, seconds in times.items() if name != peer)
    print(f"{title:42s} {peer} = {1e3 * times[peer]:8.2f} ms   {ratios}")
