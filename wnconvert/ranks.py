"""The processes that work on one conversion: this one alone, or the ones that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from wnconvert.errors import InputError, WnconvertError

_Value = TypeVar("_Value")


class Ranks:
    """This process alone."""

    rank = 0
    count = 1

    def together(self, work: Callable[[], _Value]) -> list[_Value]:
        """Do something on every rank, and return what each came to. What fails on one fails on all.

        Raises:
            WnconvertError: of the first rank that failed.
            InputError: a rank died.
        """
        return [work()]


class _Distributed(Ranks):
    def __init__(self) -> None:
        from torch import distributed

        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    def together(self, work: Callable[[], _Value]) -> list[_Value]:
        from torch import distributed

        mine: tuple[WnconvertError | None, Any]
        try:
            mine = (None, work())
        except OSError as error:
            mine = (InputError(f"rank {self.rank}: {error.filename or ''}: {error.strerror or error}"), None)
        except WnconvertError as error:
            mine = (error, None)
        everyone: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(everyone, mine)
        except RuntimeError as error:
            raise InputError("another process of this run died, and nothing was written") from error
        failed = next((error for error, _ in everyone if error is not None), None)
        if failed is not None:
            raise failed
        return [value for _, value in everyone]


ALONE = Ranks()


@contextlib.contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the other processes for as long as the context lasts, if torchrun started this one."""
    if rank_of(environment) is None:
        yield ALONE
        return
    from torch import distributed

    distributed.init_process_group("gloo")
    try:
        yield _Distributed()
    finally:
        distributed.destroy_process_group()


def rank_of(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of this process among those that torchrun started, or None if it did not."""
    if "TORCHELASTIC_RUN_ID" not in environment or int(environment.get("WORLD_SIZE", "1")) == 1:
        return None
    return int(environment["RANK"])


def shares(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Deal out parts so that every rank has about as many bytes: the largest first, each to whom has least."""
    dealt: list[list[str]] = [[] for _ in range(count)]
    load = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = load.index(min(load))
        dealt[rank].append(name)
        load[rank] += sizes[name]
    return dealt
