"""One name: the network that a library builds for it, made to run, and what became of it."""

from __future__ import annotations

import dataclasses
import gc
import time
import weakref
from collections.abc import Generator
from typing import Literal

from torch import Tensor, nn

from zoo import outputs, weights
from zoo.outputs import Inputs

ATTEMPTS = 150
"""Sizes of network and input that are tried before a name counts as not built."""

Answer = bool | Literal["plain too"] | None
"""Whether something works; `plain too` if the plain network cannot do it either; None if it was not tried."""


@dataclasses.dataclass(slots=True)
class Attempt:
    """A network as a library builds it, and what to call it with."""

    model: nn.Module
    inputs: Inputs


Attempts = Generator[Attempt, Exception, None]
"""Yields attempts until one runs. Receives what went wrong with the one before."""


class NotBuilt(Exception):
    """A library cannot build this name here; the message is the reason in one line."""


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of one name.

    Attributes:
        library: where the name comes from.
        name: of the architecture or class.
        tool: fingerprint of the tool that was tried.
        built: whether there is a network that runs.
        reason: why not.
        seconds: the whole trial took.
        parameters: number of values.
        inputs: what it was called with.
        walker: what found the sites.
        walker_note: why not a better one.
        sites: number of weights that were split.
        kinds: how many of each kind.
        skipped: how many weights were left alone, by reason.
        unknown: weights of which nothing told what they are.
        missed: parameters of two or more axes that the report does not mention.
        equal: outputs have the same bits after apply.
        moved: training the split network moved its outputs; otherwise parity says nothing.
        distance: between the trained network and its folded form, relative to the largest output.
        sensitivity: how far moving every weight by one ulp moves the outputs. Measured where `distance` is large.
        parity: that is within the tolerance.
        parity_dtype: in which it was measured.
        identical: apply and fold give the same state dict, bit for bit.
        pickled: the split network pickles.
        copied: a deep copy folds without touching the original.
        wrong: everything that must not be.
    """

    library: str
    name: str
    tool: str = ""
    built: bool = False
    reason: str | None = None
    seconds: float = 0.0
    parameters: int = 0
    inputs: str = ""
    walker: str | None = None
    walker_note: str | None = None
    sites: int = 0
    kinds: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)
    missed: list[str] = dataclasses.field(default_factory=list)
    equal: bool | None = None
    moved: bool | None = None
    distance: float | None = None
    sensitivity: float | None = None
    parity: bool | None = None
    parity_dtype: str | None = None
    identical: bool | None = None
    pickled: Answer = None
    copied: Answer = None
    wrong: list[str] = dataclasses.field(default_factory=list)


def attempt(outcome: Outcome, attempts: Attempts) -> None:
    """Find an attempt that runs, and try the conversion on it. Fills in the outcome."""
    start = time.monotonic()
    try:
        found, before = _first_that_runs(attempts)
    except NotBuilt as error:
        outcome.reason = str(error)
    else:
        outcome.built = True
        outcome.parameters = sum(parameter.numel() for parameter in found.model.parameters())
        outcome.inputs = str(found.inputs)
        # Here, because that module needs the classes above.
        from zoo import conversion

        conversion.Conversion(outcome, found.model, found.inputs).run(before)
    attempts.close()
    del attempts
    gc.collect()
    gc.freeze()  # libraries: the next collection need not look at them again
    outcome.seconds = round(time.monotonic() - start, 2)


LACKS_MEMORY = "needs more memory than a worker has"


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    """An error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:240]}" if lines else type(error).__name__


def _first_that_runs(attempts: Attempts) -> tuple[Attempt, list[Tensor]]:
    error: Exception | None = None
    found: Attempt | None = None
    filled: weakref.ref[nn.Module] | None = None
    first_error = ""
    for _ in range(ATTEMPTS):
        # Before the next one is built: two networks may not fit in memory.
        found = None
        try:
            found = next(attempts) if error is None else attempts.send(error)
            if filled is None or filled() is not found.model:
                weights.fill(found.model.eval())
                filled = weakref.ref(found.model)
            results = outputs.run(found.model, found.inputs)
        except StopIteration:
            break
        except NotBuilt:
            raise
        except Exception as raised:
            if lacks_memory(raised):
                raise NotBuilt(LACKS_MEMORY) from raised
            # Its frames hold the network.
            error = raised.with_traceback(None)
        else:
            if outputs.is_finite(results):
                return found, results
            error = ValueError("its outputs are not finite")
        first_error = first_error or one_line(error)
    raise NotBuilt(first_error or "no attempt")
