"""Load a split checkpoint into a module that is not split yet, or split elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from wnconvert import layers, weightnorm
from wnconvert.carriers import module_forms as forms
from wnconvert.carriers.graph_module import GraphWeights
from wnconvert.errors import InputError, UsageError
from wnconvert.names import Pair, find_pairs, spell
from wnconvert.walk.modules import kind_of

Module = TypeVar("Module", bound=nn.Module)


@runtime_checkable
class _HoldsTensors(Protocol):
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its full name."""


def load_into(module: Module, checkpoint: str | Path | Mapping[str, Any]) -> Module:
    """Split a module at exactly the weights that the checkpoint holds split, then load it strictly.

    `load_state_dict` alone cannot: plain and split never load into one another, and `strict=False` then silently leaves
    random weights.

    Args:
        module: changed in place. Weights that it holds split already, in any form, are loaded as they are.
        checkpoint: a state dict, plain, legacy or parametrized, or a file that holds one, also nested.

    Returns:
        The same module. What it keeps beside tensors (`get_extra_state`) stays its own.

    Raises:
        InputError: the checkpoint does not fit; the message lists the first differences. The module is left unchanged.
    """
    graphs = GraphWeights(module)
    held = _held(module, graphs)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = _with_twins(
        [*_groups(parameters), *_groups({name: pair.v for name, pair in held.items()})],
        _best_match(module, _tensors(checkpoint)),
    )
    pairs = {name: pair for name, pair in _pairs(state).items() if name in held or name in parameters}
    _require_fit(module, state, pairs, held)
    magnitudes: dict[int, nn.Parameter] = {}
    for name, pair in pairs.items():
        if name not in held:
            _attach(module, name, state[pair.g], state[pair.v], magnitudes=magnitudes, graphs=graphs)
    graphs.finish()
    meta = any(parameter.is_meta for parameter in parameters.values())
    extra = {key: value for key, value in module.state_dict().items() if not isinstance(value, Tensor)}
    module.load_state_dict(extra | _spelled_for(_held(module, graphs), state, pairs), strict=True, assign=meta)
    return module


def _pairs(state: Mapping[str, Tensor]) -> dict[str, Pair]:
    found = find_pairs({key: tuple(tensor.shape) for key, tensor in state.items()})
    return {pair.name: pair for pair in found if not pair.problem}


def _groups(named: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of one and the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in named.items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _with_twins(groups: list[list[str]], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add what a file leaves out because it is tied to something that it holds, as safetensors files do."""
    pairs, full = _pairs(state), dict(state)
    for twins in groups:
        source = next((name for name in twins if name in state or name in pairs), None)
        for twin in twins:
            if source is None or twin in state or twin in pairs:
                continue
            if source in pairs:
                pair = pairs[source]
                full |= dict(zip(spell(twin, pair.scheme), (state[pair.g], state[pair.v]), strict=True))
            else:
                full[twin] = state[source]
    return full


def _tensors(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    if isinstance(checkpoint, (str, Path)):
        from wnconvert import files

        document = files.read(Path(checkpoint))
        if not isinstance(document, _HoldsTensors):
            raise InputError(f"{checkpoint}: a file of format {document.format} holds no state dict to load")
        return document.tensors()
    if not isinstance(checkpoint, Mapping):
        raise UsageError(f"needs a state dict or the path of a file, not {type(checkpoint).__name__}")
    return _flatten(checkpoint)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, item in value.items():
        if isinstance(item, Tensor):
            flat[f"{prefix}{key}"] = item
        elif isinstance(item, Mapping):
            flat |= _flatten(item, f"{prefix}{key}.")
    return flat


def _plain_names(state: Mapping[str, Tensor]) -> set[str]:
    names = set(state)
    for pair in _pairs(state).values():
        names -= {pair.g, pair.v}
        names.add(pair.name)
    return names


def _best_match(module: nn.Module, flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a nested checkpoint that shares most names with the module and brings fewest others."""
    expected = _plain_names(_module_tensors(module))
    anchors = sorted(expected, key=len)[-3:]
    found = _plain_names(flat)
    prefixes = {name.removesuffix(anchor) for anchor in anchors for name in found if name.endswith(f".{anchor}")}
    candidates = [_below(flat, prefix) for prefix in ("", *sorted(prefixes))]
    return max(candidates, key=lambda state: 2 * len(expected & (names := _plain_names(state))) - len(names))


def _below(flat: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in flat.items() if key.startswith(prefix)}


def _module_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}


def _require_fit(
    module: nn.Module, state: dict[str, Tensor], pairs: Mapping[str, Pair], held: Mapping[str, forms.SplitWeight]
) -> None:
    expected, spelled = _module_tensors(module), _pairs(state)
    wanted, given = _plain_names(expected), _plain_names(state)
    problems = [f"{name} is missing" for name in sorted(wanted - given)]
    problems += [f"{name} is not in the module" for name in sorted(given - wanted)]
    for name in sorted(wanted & given):
        ours = expected.get(name, expected.get(spell(name, "legacy")[1], expected.get(spell(name, "parametrized")[1])))
        theirs = state[spelled[name].v] if name in spelled else state[name]
        if ours is not None and ours.shape != theirs.shape:
            problems.append(f"{name} has shape {list(theirs.shape)}, the module needs {list(ours.shape)}")
        elif name in held and name in pairs and held[name].g.shape != state[pairs[name].g].shape:
            axes = f"{list(state[pairs[name].g].shape)}, the module's {list(held[name].g.shape)}"
            problems.append(f"the magnitude of {name} has shape {axes}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InputError(f"the checkpoint does not fit the module: {'; '.join(problems[:4])}{more}")


def _held(module: nn.Module, graphs: GraphWeights) -> dict[str, forms.SplitWeight]:
    """The weights that a module holds split under keys that say so."""
    held = forms.all_split_weights(module)
    graphs.read(held)
    return {**held, **{name: pair for name, pair in graphs.pairs.items() if pair.scheme is not None}}


def _attach(
    module: nn.Module, name: str, g: Tensor, v: Tensor, *, magnitudes: dict[int, nn.Parameter], graphs: GraphWeights
) -> None:
    """Split one weight. Tied weights share the magnitude that was made first, by the identity of the weight."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf not in owner._parameters:
        return  # one module under two names
    weight = owner.get_parameter(leaf)
    groups, axis = weightnorm.pair_axis(g.shape, v.shape, name)
    kind = kind_of(owner)
    spec = layers.Spec.of(kind.name if kind else "Unknown", axis, groups, v.dim())
    new_g = nn.Parameter(torch.empty(g.shape, dtype=weight.dtype, device=weight.device), weight.requires_grad)
    new = magnitudes.setdefault(id(weight), new_g), weight
    if graphs.holds(name):
        graphs.register(name, new)
    else:
        layers.attach(owner, leaf, spec, *new)
    graphs.split(name, spec, weight)


def _spelled_for(
    split: Mapping[str, forms.SplitWeight], state: dict[str, Tensor], pairs: Mapping[str, Pair]
) -> dict[str, Tensor]:
    """The state dict as the module's own split weights spell and split it."""
    spelled = dict(state)
    for name, held in split.items():
        pair = pairs.get(name)
        if pair is None:
            if held.form != "wnconvert":
                # Only our own layers split a plain weight while they load.
                groups, axis = weightnorm.pair_axis(held.g.shape, held.v.shape, name)
                halves = weightnorm.split(spelled.pop(name), axis, groups=groups, name=name)
                spelled |= dict(zip(held.keys(name), halves, strict=True))
            continue
        for old, new in zip((pair.g, pair.v), held.keys(name), strict=True):
            spelled[new] = spelled.pop(old)
    return spelled
