"""The processes that work on one command: this one alone, or the ones that torchrun started."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from wnconvert.errors import InputError, RankDied, WnconvertError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_Value = TypeVar("_Value")

# One rank may write for days while another waits. Whoever dies is noticed at once, by the connection.
_LONGEST_WAIT = datetime.timedelta(days=7)
_JOIN = 300.0
"""Seconds for the others to start. A busy machine takes a minute to import torch."""

_LEAVE = 60.0
_POLL = 0.02


class Ranks:
    """This process alone."""

    rank = 0
    count = 1

    def together(self, work: Callable[[], _Value]) -> list[_Value]:
        """Do something on every rank, and return what each came to. What fails on one fails on all.

        Raises:
            WnconvertError, OSError, MemoryError: of the first rank that failed.
            RankDied: a rank is gone.
        """
        return [work()]

    def agreed(self, work: Callable[[], _Value]) -> _Value:
        """Do something on every rank, and return what it came to on this one. Fails as `together` does."""
        mine: list[_Value] = []
        self.together(lambda: mine.append(work()))
        return mine[0]

    def first(self, work: Callable[[], _Value]) -> _Value:
        """Do something on rank 0, and return on every rank what it came to. Fails as `together` does."""
        found: Any = self.together(lambda: work() if self.rank == 0 else None)
        return cast("_Value", found[0])

    def speaks(self, *, last: bool = False) -> bool:  # noqa: ARG002
        """Whether this is the rank that prints. If it is the `last` word, of whoever is left, that is the first to ask.

        A process alone always is.
        """
        return True


class _Distributed(Ranks):
    def __init__(self, rank: int, count: int, store: Store) -> None:
        self.rank, self.count = rank, count
        self._store = store
        self._broken = False

    def meet(self) -> None:
        """Wait until every rank is there.

        Raises:
            InputError: some do not come.
        """
        self._store.set(f"here {self.rank}", "")
        if not _until(lambda: self._store.check([f"here {rank}" for rank in range(self.count)]), _JOIN):
            raise InputError(f"torchrun says that {self.count} processes work together, but not all of them came")

    def together(self, work: Callable[[], _Value]) -> list[_Value]:
        from torch import distributed

        mine: tuple[Exception | None, Any]
        try:
            mine = (None, work())
        except (WnconvertError, OSError, MemoryError) as error:
            mine = (error, None)
        everyone: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(everyone, mine)
        except RuntimeError as error:
            # torchrun tells the others to stop when one is gone: not while this one cleans up and says so.
            _stay()
            self._broken = True
            # What is known about the failure says more than that the others left because of it.
            raise mine[0] or RankDied("another process of this run died") from error
        failed = next((error for error, _ in everyone if error is not None), None)
        if failed is not None:
            raise failed
        return [value for _, value in everyone]

    def speaks(self, *, last: bool = False) -> bool:
        try:
            is_first = self._store.add("spoken", 1) == 1 if last or self.rank == 0 else False
        except RuntimeError:
            # Whoever keeps the store is gone.
            return self.rank == 0
        return is_first or (self.rank == 0 and not last)

    def leave(self) -> None:
        """Do not end before rank 0 has printed: torchrun stops all processes when one ends with an error."""
        with contextlib.suppress(RuntimeError):
            if self.rank and not self._broken:
                _until(lambda: self._store.check(["printed"]), _LEAVE)
            # The work is over. That another one ends first is no reason to end otherwise than as it came out.
            _stay()
            if self.rank == 0:
                self._store.set("printed", "")


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes for as long as the context lasts, if torchrun started this one.

    Raises:
        InputError: the others do not come.
    """
    if not _is_one_of_several():
        yield ALONE
        return
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    wait = datetime.timedelta(seconds=_JOIN)
    try:
        # torchrun itself keeps the store, so that it outlives every rank.
        store, rank, count = next(rendezvous("env://", timeout=wait))
        crew = _Distributed(rank, count, store)
        crew.meet()
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_LONGEST_WAIT)
    except RuntimeError as error:
        raise InputError(f"cannot reach the other processes of this run: {str(error).splitlines()[0]}") from error
    try:
        yield crew
    finally:
        # Whoever still waits for this process fails now and does not hang.
        distributed.destroy_process_group()
        crew.leave()


def _is_one_of_several() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _stay() -> None:
    """From now on, do not end when torchrun says so."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def shares(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Deal out parts so that every rank has about as many bytes: the largest first, each to whom has least."""
    dealt: list[list[str]] = [[] for _ in range(count)]
    load = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = load.index(min(load))
        dealt[rank].append(name)
        # At least 1, or all that are empty would fall to one rank.
        load[rank] += max(1, sizes[name])
    return dealt


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for something, and say whether it came. Unlike the store's own waiting, a signal ends it."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL)
    return True
