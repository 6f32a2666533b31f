"""The Python API. Modules change in place, dicts and programs come back new: use what is returned."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from wnconvert import compare, convert, files, jobs
from wnconvert.carriers import Carrier
from wnconvert.carriers.module import ModuleCarrier
from wnconvert.carriers.module_forms import undone_on_error
from wnconvert.carriers.program import ProgramCarrier
from wnconvert.carriers.torchscript import ScriptedCarrier
from wnconvert.errors import NothingToDo, UsageError
from wnconvert.files import ReadOptions
from wnconvert.files.torch_file import DictCarrier, carrier_of
from wnconvert.report.model import Report
from wnconvert.report.verdict import Verdict
from wnconvert.sites import Dim, Scheme, Selection, Site
from wnconvert.walk.ladder import Example

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any] | None
Model = TypeVar("Model", nn.Module, Mapping[str, Any], ExportedProgram)
_InMemory = ModuleCarrier | DictCarrier | ScriptedCarrier | ProgramCarrier


@dataclasses.dataclass(frozen=True, slots=True)
class Result(Generic[Model]):
    """A converted network and what was done to it."""

    model: Model
    report: Report


def find(
    model: nn.Module | Mapping[str, Any] | ExportedProgram, *, dim: Dim = "torch", example_inputs: ExampleInputs = None
) -> list[Site]:
    """List every weight of a network that is or could be split, and the ones that cannot, with reasons.

    Args:
        model: a module, an exported program, or a state dict (then kinds are inferred from the keys).
        dim: which axis to keep: `torch` as torch.nn.utils would, `out` for the output unit, an axis, or None.
        example_inputs: of one forward pass of a module: a tensor, a sequence of positional arguments or a mapping of
            keyword arguments. Where torch.fx cannot trace it, these show the weights that it hands to functions.
    """
    return _carrier(model, example=Example.of(example_inputs)).sites(_dim(dim))


def apply(
    model: Model,
    *,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    kinds: str | Sequence[str] = (),
    dim: Dim = "torch",
    names: Scheme = "legacy",
    example_inputs: ExampleInputs = None,
) -> Result[Model]:
    """Split the weights of every Linear, convolution, recurrent and attention layer into magnitude and direction.

    The function stays the same, bit for bit. A second call changes nothing and says so in the report. Build the
    optimizer after this call: the parameters are new, and what hung on the old ones (hooks, attributes) is gone. `v`
    shares memory with the weight it was: a state dict taken before trains along, unless it was copied.

    Args:
        model: a module, changed in place, or a state dict or exported program, which is left alone.
        include: shell globs on names such as `encoder.*`; all if empty.
        exclude: shell globs on names; they win.
        kinds: shell globs on kinds such as `Conv*`; every kind but embeddings if empty.
        dim: see `find`.
        names: how the keys of a state dict are spelled. A module always writes legacy keys.
        example_inputs: see `find`.

    Raises:
        UsageError: a glob matches nothing.
        InputError: a lazy layer has no shape yet.
    """
    selection = _selection(include, exclude, kinds)
    with _outside_inference_mode(model):
        carrier = _carrier(model, example=Example.of(example_inputs))
        with _changing(carrier):
            try:
                report = convert.apply(carrier, selection=selection, dim=_dim(dim), names=names)
            except NothingToDo as nothing:
                report = _report_of(nothing)
        return Result(_result(model, carrier), report)


def fold(
    model: Model,
    *,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    kinds: str | Sequence[str] = (),
) -> Result[Model]:
    """Multiply every split weight back into a plain one: ours, torch's legacy hooks and torch's parametrizations.

    A network with nothing to fold is returned as it is, and the report lists no folded site.

    Args:
        model: a module, changed in place, or a state dict or exported program, which is left alone.
        include: see `apply`.
        exclude: see `apply`.
        kinds: see `apply`.

    Raises:
        PairError: a pair holds NaN, infinity, or a zero direction with a magnitude.
        UsageError: a glob matches nothing.
    """
    selection = _selection(include, exclude, kinds)
    with _outside_inference_mode(model):
        # What is split is known without a trace.
        carrier = _carrier(model, trace=False)
        if isinstance(carrier, ModuleCarrier):
            carrier.require_pairs(selection)
        with _changing(carrier):
            try:
                report = convert.fold(carrier, selection=selection)
            except NothingToDo as nothing:
                report = _report_of(nothing)
        return Result(_result(model, carrier), report)


def convert_file(
    path: str | Path,
    output: str | Path | None = None,
    command: str = "fold",
    *,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    kinds: str | Sequence[str] = (),
    dim: Dim = "torch",
    names: Scheme = "legacy",
    arch: str | None = None,
    drop_optimizer: bool = False,
    single_file: bool = False,
    unsafe_load: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    check: bool = True,
) -> Report:
    """Convert a file, as the command line does. See `jobs.convert_file` for the errors.

    Args:
        path: a checkpoint, a pickled module, a safetensors file or an ONNX model.
        output: where the result goes; `model.folded.pt` and the like beside the input if None.
        command: `apply`, `fold` or `rename`.
        include: see `apply`, as for the next four.
        exclude: globs that win.
        kinds: globs on kinds.
        dim: which axis `apply` keeps.
        names: how `apply` and `rename` spell the keys.
        arch: builds the module that the checkpoint belongs to.
        drop_optimizer: leave out optimizer state.
        single_file: take the data files of an ONNX model into it.
        unsafe_load: unpickle whole modules, which can run code.
        dry_run: report only.
        overwrite: replace an existing output.
        check: read the result back and compare before it appears under its name.
    """
    job = jobs.Job(
        command=command,
        selection=_selection(include, exclude, kinds),
        dim=_dim(dim),
        names=names,
        reading=ReadOptions(unsafe_load, arch, drop_optimizer, single_file),
        dry_run=dry_run,
        overwrite=overwrite,
        check=check,
    )
    return jobs.convert_file(Path(path), None if output is None else Path(output), job)


def verify(
    a: nn.Module | Mapping[str, Any] | ExportedProgram | str | Path,
    b: nn.Module | Mapping[str, Any] | ExportedProgram | str | Path,
    *,
    unsafe_load: bool = False,
) -> Verdict:
    """Find out whether two networks are the same function, split weights multiplied back.

    Args:
        a: a module, a state dict, an exported program or a file.
        b: likewise; the two need not be of one kind.
        unsafe_load: unpickle whole modules, which can run code.

    Returns:
        The tensors side by side. Two ONNX files are also run on the same random inputs.
    """
    reading = ReadOptions(unsafe_load=unsafe_load)
    if isinstance(a, (str, Path)) and isinstance(b, (str, Path)):
        return compare.compare_files(Path(a), Path(b), reading)
    (name_a, carrier_a), (name_b, carrier_b) = _side(a, reading), _side(b, reading)
    weights = compare.compare_weights(carrier_a, carrier_b, match_prefix=True)
    return Verdict(name_a, name_b, (carrier_a.walker, carrier_b.walker), weights)


@contextlib.contextmanager
def _changing(carrier: _InMemory) -> Iterator[None]:
    """Leave a module in working order whatever happens: converted, or as it was."""
    if not isinstance(carrier, ModuleCarrier):
        yield
        return
    with undone_on_error(carrier.module):
        try:
            yield
        finally:
            # Also after an interruption, or a graph split in part would not run.
            carrier.clean()


@contextlib.contextmanager
def _outside_inference_mode(model: nn.Module | Mapping[str, Any] | ExportedProgram) -> Iterator[None]:
    """Make ordinary tensors, which can be trained later, also where the caller is in inference mode.

    A module that was made in that mode can live nowhere else.
    """
    if not torch.is_inference_mode_enabled() or (isinstance(model, nn.Module) and _made_in_inference_mode(model)):
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _made_in_inference_mode(module: nn.Module) -> bool:
    # A lazy parameter cannot even be asked.
    return any(type(parameter) is nn.Parameter and parameter.is_inference() for parameter in module.parameters())


def _side(
    model: nn.Module | Mapping[str, Any] | ExportedProgram | str | Path, reading: ReadOptions
) -> tuple[str, Carrier]:
    if isinstance(model, (str, Path)):
        return str(model), files.read(Path(model), reading).carrier
    return type(model).__name__, _carrier(model, trace=False)


def _carrier(
    model: nn.Module | Mapping[str, Any] | ExportedProgram, *, trace: bool = True, example: Example | None = None
) -> _InMemory:
    if isinstance(model, torch.jit.ScriptModule):
        return ScriptedCarrier(model)
    if isinstance(model, nn.Module):
        return ModuleCarrier(model, trace=trace, example=example)
    if isinstance(model, ExportedProgram):
        return ProgramCarrier(model)
    if isinstance(model, Mapping):
        return carrier_of(model)
    hint = "; convert_file takes a path" if isinstance(model, (str, Path)) else ""
    raise UsageError(f"needs a torch.nn.Module, an exported program or a state dict, not {type(model).__name__}{hint}")


def _result(model: Model, carrier: _InMemory) -> Model:
    return model if isinstance(carrier, ModuleCarrier) else cast("Model", carrier.rebuild())


def _selection(include: str | Sequence[str], exclude: str | Sequence[str], kinds: str | Sequence[str]) -> Selection:
    globs = [(value,) if isinstance(value, str) else tuple(value or ()) for value in (include, exclude, kinds)]
    if not all(isinstance(glob, str) for value in globs for glob in value):
        raise UsageError("include, exclude and kinds take shell globs, one or a list of them")
    return Selection(*globs)


def _dim(dim: Dim) -> Dim:
    if dim in ("torch", "out", None) or (isinstance(dim, int) and not isinstance(dim, bool)):
        return dim
    raise UsageError(f"dim is 'torch', 'out', None or an axis, not {dim!r}")


def _report_of(nothing: NothingToDo) -> Report:
    if nothing.report is None:
        raise nothing
    return nothing.report
