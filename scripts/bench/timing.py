"""Time several things in turns and compare medians, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

_Sample = TypeVar("_Sample")


def in_turns(functions: Mapping[str, Callable[[], _Sample]], runs: int) -> dict[str, list[_Sample]]:
    """What each function returned in each of `runs` rounds, after one round that does not count."""
    samples: dict[str, list[_Sample]] = {name: [] for name in functions}
    for turn in range(runs + 1):
        for name, function in functions.items():
            sample = function()
            if turn:
                samples[name].append(sample)
    return samples


def medians(functions: Mapping[str, Callable[[], object]], runs: int = 9) -> dict[str, float]:
    """Median seconds of each function over `runs` rounds, after one round that does not count."""
    timed = {name: functools.partial(_seconds, function) for name, function in functions.items()}
    return {name: statistics.median(values) for name, values in in_turns(timed, runs).items()}


def print_ratios(title: str, times: Mapping[str, float], peer: str) -> None:
    """One line: what was measured, and each time as a multiple of the peer's."""
    ratios = "  ".join(f"{name} {seconds / times[peer]:.2f}" for name, seconds in times.items() if name != peer)
    print(f"{title:42s} {peer} = {1e3 * times[peer]:8.2f} ms   {ratios}")


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
