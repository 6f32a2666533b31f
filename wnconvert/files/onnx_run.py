"""Run one ONNX model, as a process: `python -m wnconvert.files.onnx_run search|run MODEL FOLDER`.

`search` finds inputs that the model accepts and writes them, with its outputs, as `inputs-N.npz` and `expected-N.npz`.
`run` feeds those inputs to another model and writes `actual-N.npz`. What goes wrong is the last line printed, with exit
code 1.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from wnconvert.files.onnx_inputs import Unsupported, assignments, element_type, make, open_dims, resolve

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

Feed = dict[str, Any]


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
    inputs = session.get_inputs()
    declared = [(i.name, *element_type(i.type), i.shape) for i in inputs]
    found, last = 0, None
    deadline = time.monotonic() + SEARCH_SECONDS
    known: dict[str, int] | None = None
    for scalar in dict.fromkeys([1, *hints, 0]):
        for sizes in _candidates(declared, known):
            feed = _feed(declared, sizes, scalar)
            try:
                outputs = session.run(None, feed)
            except _ERRORS as error:
                last = error
                if time.monotonic() > deadline:
                    break
                continue
            known = sizes
            _write(folder / f"inputs-{found}.npz", feed)
            _write(folder / f"expected-{found}.npz", _named(session, outputs))
            found += 1
            break
        if found == MAX_RUNS or time.monotonic() > deadline or not _takes_scalars(feed):
            break
    return 0 if found else _fail(last or "no inputs were found that it accepts")


def _candidates(declared: list[Any], known: dict[str, int] | None) -> Iterator[dict[str, int]]:
    if known is not None:
        yield known
    yield from assignments(open_dims([shape for *_, shape in declared]))


def _feed(declared: list[Any], sizes: dict[str, int], scalar: int) -> Feed:
    rng = np.random.default_rng(0)
    feed: Feed = {}
    for i, (name, kind, sequence, dims) in enumerate(declared):
        value = make(rng, kind, resolve(i, dims, sizes), scalar)
        feed[name] = [value] if sequence else value
    return feed


def _takes_scalars(feed: Feed) -> bool:
    """Whether another `scalar` makes another feed."""
    return any(isinstance(x, np.ndarray) and x.size == 1 and x.dtype.kind in "iu" for x in feed.values())


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
