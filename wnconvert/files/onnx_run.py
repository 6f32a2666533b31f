"""Run one ONNX model, as a process: `python -m wnconvert.files.onnx_run search|run MODEL FOLDER`.

`search` finds inputs that the model accepts and writes them, with its outputs, as `inputs-N.npz` and `expected-N.npz`.
`run` feeds those inputs to another model and writes `actual-N.npz`. What goes wrong is the last line printed, with exit
code 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from wnconvert.files.onnx_inputs import Dims, Unsupported, assignments, element_type, make, open_dims, resolve
from wnconvert.files.outputs import SMALL

SEARCH_SECONDS = 60.0
"""For finding inputs, all together."""

MAX_RUNS = 4
"""Different choices of the model's integer inputs that are compared."""

# Raised for anything that a model or its inputs can be wrong in.
_ERRORS = (
    runtime.EPFail,
    runtime.Fail,
    runtime.InvalidArgument,
    runtime.InvalidGraph,
    runtime.InvalidProtobuf,
    runtime.NoSuchFile,
    runtime.NotImplemented,
    runtime.RuntimeException,
    RuntimeError,
    ValueError,
    TypeError,
    MemoryError,
)

MAX_ACCEPTED = 12
"""Sizes that run, of which the one is taken that shows most."""

IMPROVE_SECONDS = 4.0
"""For finding better sizes once some run."""

MAX_PROBED = 4
"""Inputs whose influence is looked at."""

VISIBLE = 1e-3
"""Of the largest value of an output: what counts as an influence on it."""

Feed = dict[str, Any]
Declared = tuple[str, type[np.generic], bool, Dims]


@dataclasses.dataclass
class Run:
    """Inputs that the model accepts, what it makes of them, and how many of them matter."""

    sizes: dict[str, int]
    feed: Feed
    outputs: Feed
    influence: int = 0


def main() -> int:
    """Run as the module's docstring says."""
    mode, model, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    try:
        session = _session(model)
        return _search(session, folder) if mode == "search" else _replay(session, folder)
    except (*_ERRORS, Unsupported) as error:
        return _fail(error)


def _session(model: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _search(session: onnxruntime.InferenceSession, folder: Path) -> int:
    hints = json.loads((folder / "hints.json").read_text())
    declared = [(i.name, *element_type(i.type), i.shape) for i in session.get_inputs()]
    deadline = time.monotonic() + SEARCH_SECONDS
    found: list[Run] = []
    problem: object = "no inputs were found that it accepts"
    for scalar in dict.fromkeys([1, *hints, 0]):
        known = [found[-1].sizes] if found else []
        best, error = _best_run(session, declared, scalar, known, deadline)
        problem = error or problem
        if best is not None and not any(_same(best.outputs, run.outputs) for run in found):
            found.append(best)
        if len(found) == MAX_RUNS or time.monotonic() > deadline or not _takes_scalars(declared, known):
            break
    for i, run in enumerate(found):
        _write(folder / f"inputs-{i}.npz", run.feed)
        _write(folder / f"expected-{i}.npz", run.outputs)
    return 0 if found else _fail(problem)


def _best_run(
    session: onnxruntime.InferenceSession,
    declared: list[Declared],
    scalar: int,
    known: list[dict[str, int]],
    deadline: float,
) -> tuple[Run | None, Exception | None]:
    """Find sizes that the model accepts, and of those the first ones under which every input has an influence.

    A window that is too short, or an image too small, runs as well but reaches no weight.
    """
    best: Run | None = None
    error: Exception | None = None
    accepted = 0
    for sizes in itertools.chain(known, assignments(open_dims([shape for *_, shape in declared]))):
        if time.monotonic() > deadline or accepted == MAX_ACCEPTED:
            break
        feed = _feed(declared, sizes, scalar, seed=0)
        try:
            run = Run(sizes, feed, _named(session, session.run(None, feed)))
        except _ERRORS as refused:
            error = refused
            continue
        if not accepted:
            deadline = min(deadline, time.monotonic() + IMPROVE_SECONDS)
        accepted += 1
        other = _feed(declared, sizes, scalar, seed=1)
        wanted = [name for name, x in feed.items() if np.asarray(x).dtype.kind == "f"][:MAX_PROBED]
        run.influence = sum(_differs(run.outputs, session.run(None, feed | {name: other[name]})) for name in wanted)
        if best is None or run.influence > best.influence:
            best = run
        if run.influence == len(wanted):
            break
    return best, error


def _same(outputs: Feed, others: Feed) -> bool:
    """Whether a run made nothing new."""
    return outputs.keys() == others.keys() and all(
        np.array_equal(x, others[name], equal_nan=x.dtype.kind in "fc") for name, x in outputs.items()
    )


def _differs(outputs: Feed, others: list[Any]) -> bool:
    """Whether the outputs of another feed are visibly not the same."""
    arrays = [array for other in others for array in _arrays(other)]
    for x, y in zip(outputs.values(), arrays, strict=False):
        if x.dtype.kind != "f" or x.shape != y.shape:
            if not np.array_equal(x, y):
                return True
            continue
        scale = max(float(np.max(np.abs(x), initial=0, where=np.isfinite(x))), SMALL)
        if not np.allclose(x, y, rtol=0, atol=VISIBLE * scale, equal_nan=True):
            return True
    return False


def _feed(declared: list[Declared], sizes: dict[str, int], scalar: int, seed: int) -> Feed:
    rng = np.random.default_rng(seed)
    feed: Feed = {}
    for i, (name, kind, sequence, dims) in enumerate(declared):
        value = make(rng, kind, resolve(i, dims, sizes), scalar)
        feed[name] = [value] if sequence else value
    return feed


def _takes_scalars(declared: list[Declared], known: list[dict[str, int]]) -> bool:
    """Whether another `scalar` makes another feed."""
    sizes = known[0] if known else dict.fromkeys(open_dims([shape for *_, shape in declared]), 1)
    return any(
        issubclass(kind, np.integer) and int(np.prod(resolve(i, dims, sizes))) == 1
        for i, (_, kind, _, dims) in enumerate(declared)
    )


def _replay(session: onnxruntime.InferenceSession, folder: Path) -> int:
    sequences = {i.name for i in session.get_inputs() if i.type.startswith("seq(")}
    for path in sorted(folder.glob("inputs-*.npz")):
        with np.load(path) as arrays:
            feed: Feed = {name: [arrays[name][0]] if name in sequences else arrays[name] for name in arrays.files}
        outputs = session.run(None, feed)
        _write(folder / path.name.replace("inputs", "actual"), _named(session, outputs))
    return 0


def _named(session: onnxruntime.InferenceSession, outputs: list[Any]) -> Feed:
    named: Feed = {}
    for declared, output in zip(session.get_outputs(), outputs, strict=True):
        for i, array in enumerate(_arrays(output)):
            named[f"{declared.name}[{i}]" if isinstance(output, (list, dict)) else declared.name] = array
    return named


def _arrays(output: Any) -> list[NDArray[Any]]:
    """The arrays in an output: itself, or those of a sequence or map."""
    if output is None:
        return []
    if isinstance(output, dict):
        return [np.asarray(list(output.values()))]
    if isinstance(output, list):
        return [array for item in output for array in _arrays(item)]
    array = np.asarray(output)
    return [array.astype(np.str_) if array.dtype == object else array]


def _write(path: Path, arrays: Feed) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})


def _fail(error: object) -> int:
    print(" ".join(str(error).split()))  # noqa: T201 - read by the process that started this one
    return 1


if __name__ == "__main__":
    sys.exit(main())
