"""The ways a live module may hold a split weight: ours, torch's legacy hooks, torch's parametrizations, a graph."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from wnconvert import layers
from wnconvert.names import is_norm_shape, plain_name, spell
from wnconvert.sites import Scheme

Form = Literal["wnconvert", "legacy", "parametrized", "graph"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SplitWeight:
    """A split weight of one module.

    Attributes:
        form: who split it.
        g, v: the parameters.
        problem: why it cannot be folded, or None.
        named: full names of g and v where a graph names them.
    """

    form: Form
    g: Tensor
    v: Tensor
    problem: str | None = None
    named: tuple[str, str] | None = None

    @property
    def scheme(self) -> Scheme | None:
        """How its keys are spelled in a state dict, or None where a graph has names of its own for them."""
        if self.named is None:
            return "parametrized" if self.form == "parametrized" else "legacy"
        half = plain_name(self.named[0])
        return half[1] if half is not None and spell(half[0], half[1]) == self.named else None

    def keys(self, name: str) -> tuple[str, str]:
        """Keys of g and v in the state dict of the network, for the full name of the weight."""
        return self.named or spell(name, self.scheme or "legacy")


def split_weights(module: nn.Module) -> dict[str, SplitWeight]:
    """Every split weight of this very module, by the name of the plain weight."""
    found: dict[str, SplitWeight] = {}
    if layers.is_scripted(module):
        return found
    wrapped = (
        f"its layer has become a {type(module).__name__} since; undo that first" if layers.wrapper(module) else None
    )
    for name in layers.split_names(module):
        found[name] = _pair(module, spell(name, "legacy"), "wnconvert", wrapped)
    for _, hook in _legacy_hooks(module):
        found[hook.name] = _pair(module, spell(hook.name, "legacy"), "legacy")
    for name, chain in _parametrizations(module):
        if isinstance(chain[0], _WeightNorm):
            problem = None if len(chain) == 1 else "other parametrizations are stacked on it"
            found[name] = _pair(chain, ("original0", "original1"), "parametrized", problem)
    return found


def all_split_weights(root: nn.Module) -> dict[str, SplitWeight]:
    """Every split weight of a network by its full name; a module under two names counts under both."""
    return {
        f"{path}.{name}".lstrip("."): pair
        for path, module in root.named_modules(remove_duplicate=False)
        for name, pair in split_weights(module).items()
    }


def other_parametrizations(module: nn.Module) -> dict[str, str]:
    """Weights held by something that is not weight norm, with the reason to leave them alone."""
    found: dict[str, str] = {}
    if layers.is_scripted(module):
        return found
    for name, chain in _parametrizations(module):
        if not isinstance(chain[0], _WeightNorm):
            found[name] = f"parametrized by {type(chain[0]).__name__.lstrip('_')}, which is not weight norm"
    for name in module._parameters:
        if name.endswith("_orig") and name.removesuffix("_orig") + "_u" in module._buffers:
            found[name.removesuffix("_orig")] = "holds a spectral norm, which is not weight norm"
    return found


def replace(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Replace a weight of any form by a plain parameter, leaving nothing of the form behind."""
    pair = split_weights(module).get(name)
    if pair is None:
        # Tied to a weight that is split elsewhere, and plain here.
        module._parameters[name] = weight
        return
    if pair.form == "wnconvert":
        layers.detach(module, name, weight)
        return
    if pair.form == "legacy":
        _remove_legacy(module, name)
    else:
        _remove_parametrization(module, name)
    layers.restore_parameter(module, name, weight)


def remove_leftover_hooks(module: nn.Module) -> None:
    """Drop the load hooks that torch leaves behind when a parametrized weight norm is removed.

    They are local functions, so a module that keeps one cannot be pickled (pytorch#137409).
    """
    if layers.is_scripted(module):
        return
    held = {name for name, _ in _parametrizations(module)}
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        function: Any = getattr(hook, "hook", hook)
        if not getattr(function, "__qualname__", "").startswith("weight_norm.<locals>."):
            continue
        closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if "name" not in closure or closure["name"].cell_contents not in held:
            del module._load_state_dict_pre_hooks[key]


@contextlib.contextmanager
def undone_on_error(root: nn.Module) -> Iterator[None]:
    """Put every module of a network back as it was if an exception leaves the block.

    A network with graphs is left as it is: its graphs change in place, with the modules that they read.
    """
    modules = [module for module in root.modules() if not layers.is_scripted(module)]
    if any(isinstance(module, fx.GraphModule) for module in modules):
        yield
        return
    kept = [_Kept.of(module) for module in modules]
    try:
        yield
    except BaseException:
        for state in kept:
            state.restore()
        raise


class _Kept(NamedTuple):
    """What of a module may change when a weight takes another form. No tensor changes, only who holds it."""

    module: nn.Module
    cls: type[nn.Module]
    attributes: dict[str, Any]
    entries: dict[str, dict[Any, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> _Kept:
        # What was written into a weight before is no part of what is undone.
        layers.settle(module)
        attributes = dict(vars(module))
        names = "_parameters", "_modules", "_forward_pre_hooks", "_load_state_dict_pre_hooks"
        return cls(module, type(module), attributes, {name: dict(attributes[name]) for name in names})

    def restore(self) -> None:
        # Past a `__setattr__` of the layer, which may be what failed.
        object.__setattr__(self.module, "__class__", self.cls)
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        for name, entries in self.entries.items():
            held = self.attributes[name]
            held.clear()
            held.update(entries)


def _pair(holder: nn.Module, keys: tuple[str, str], form: Form, problem: str | None = None) -> SplitWeight:
    g, v = (holder.get_parameter(key) for key in keys)
    return SplitWeight(form, g, v, problem or pair_problem(g, v))


def pair_problem(g: Tensor, v: Tensor) -> str | None:
    """Why two tensors of a module cannot be multiplied into a weight, or None."""
    if v.is_meta:
        return "has no data (meta device)"
    if not type(g) is type(v) is nn.Parameter:
        return f"held as a {type(v).__name__}, which may not be replaced"
    if not is_norm_shape(tuple(g.shape), tuple(v.shape)):
        return f"g of shape {list(g.shape)} is not the norm of v of shape {list(v.shape)}"
    return None


def _legacy_hooks(module: nn.Module) -> Iterator[tuple[int, WeightNorm]]:
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, WeightNorm):
            yield key, hook


def _parametrizations(module: nn.Module) -> Iterator[tuple[str, parametrize.ParametrizationList]]:
    held = module._modules.get("parametrizations")
    if isinstance(held, nn.ModuleDict):
        for name, chain in held.items():
            if isinstance(chain, parametrize.ParametrizationList):
                yield name, chain


def _remove_legacy(module: nn.Module, name: str) -> None:
    for key, hook in list(_legacy_hooks(module)):
        if hook.name == name:
            del module._forward_pre_hooks[key]
    for key_name in spell(name, "legacy"):
        del module._parameters[key_name]
    # The hook keeps the last computed weight as a plain attribute.
    module.__dict__.pop(name, None)


def _remove_parametrization(module: nn.Module, name: str) -> None:
    held = cast("nn.ModuleDict", module._modules["parametrizations"])
    del held[name]
    # Our own class may be on top, for another weight of the same layer.
    ours, cls = layers.split_names(module), layers.base_class(type(module))
    if len(held) == 0:
        del module._modules["parametrizations"]
        plain = cls.__bases__[0]
    else:
        # A deep copy shares this class: deleting the property from it, as torch does, would break the original.
        rest = {key: value for key, value in vars(cls).items() if key not in (name, "__dict__", "__weakref__")}
        plain = type(cls.__name__, cls.__bases__, rest)
    module.__class__ = layers.subclass(plain, ours)
    remove_leftover_hooks(module)
