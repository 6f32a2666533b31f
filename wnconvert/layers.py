"""Weight normalization inside a live module: its class is swapped for a subclass that computes the weight.

`WeightNorm<Base>` is one cached subclass per base class and set of weight names. It holds parameters `<name>_g` and
`<name>_v` and a property `<name>`. Unlike torch's parametrizations, such a module pickles, deep-copies, loads plain,
legacy and parametrized keys strictly, and cannot be normalized twice by accident.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wnconvert import weightnorm
from wnconvert.errors import NotSplittable, UsageError
from wnconvert.names import spell
from wnconvert.sites import Axis, kept_axes


class Spec(NamedTuple):
    """How one weight of a module is split. Python values only, so that no tracer sees control flow on a shape."""

    kind: str
    axis: Axis
    groups: int
    reduced: tuple[int, ...] | None
    order: tuple[str, ...] = ()
    """Names of the module's parameters before any was split."""


class _Read(NamedTuple):
    """A weight handed out beyond a forward pass: whoever holds it may write into it (`nn.init`, `.data`)."""

    g: Tensor
    v: Tensor
    versions: tuple[int, int]
    weight: Tensor


_READS: weakref.WeakKeyDictionary[nn.Module, dict[str, _Read]] = weakref.WeakKeyDictionary()


class WeightNormLayer(nn.Module):
    """What every `WeightNorm<Base>` has in common. Never instantiated; comes first in the bases of the subclass."""

    _weight_norm: dict[str, Spec]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_weight_norm", ()):
            _assign(self, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        settle(self)
        reduced = super().__reduce_ex__(max(protocol, 2))
        return (_rebuild, (_base(type(self)), tuple(self._weight_norm)), *reduced[2:])

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        settle(self)
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        settle(self)
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _READS.pop(self, None)
        for name in self._weight_norm:
            _translate_keys(self, name, state_dict, prefix, errors=args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __prepare_scriptable__(self) -> nn.Module:
        raise UsageError(f"torch.jit.script cannot carry {type(self).__name__}: wnconvert.fold(model) first")


class _RecurrentLayer(WeightNormLayer):
    """Recurrent layers hand their weights to the kernel as a list, which must not go stale."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        # getattr would look like a read from outside.
        return [
            _as_parameter(self, name) if name in self._weight_norm else getattr(self, name, None)
            for name in self._flat_weights_names
        ]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        """Ignore the list that torch keeps: it is computed on each read."""

    def flatten_parameters(self) -> None:
        """Do nothing: computed weights have no memory to lay out once for all."""


def attach(module: nn.Module, name: str, spec: Spec, g: nn.Parameter, v: nn.Parameter) -> None:
    """Replace the parameter `name` of `module` by a computed weight with the given magnitude and direction."""
    names = (*split_names(module), name)
    base = _base(type(module))
    specs: dict[str, Spec] = module.__dict__.get("_weight_norm", {})
    order = next(iter(specs.values())).order if specs else tuple(module._parameters)
    specs = {**specs, name: spec._replace(order=order)}
    del module._parameters[name]
    module.__dict__["_weight_norm"] = specs
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)
    module.__class__ = _subclass(base, tuple(sorted(names)))
    # After the bias, as torch has it: optimizer state counts parameters in this order.
    for key, parameter in zip(spell(name, "legacy"), (g, v), strict=True):
        module.register_parameter(key, parameter)


def detach(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Put a plain parameter back in the place of a computed weight."""
    _READS.get(module, {}).pop(name, None)
    base = _base(type(module))
    order = module.__dict__["_weight_norm"].pop(name).order
    for key in spell(name, "legacy"):
        del module._parameters[key]
    left = split_names(module)
    if not left:
        del module.__dict__["_weight_norm"]
    module.__class__ = _subclass(base, left) if left else base
    restore_parameter(module, name, weight, order)


def restore_parameter(module: nn.Module, name: str, weight: nn.Parameter, order: tuple[str, ...] = ()) -> None:
    """Register a plain weight where it was, or before the biases, where layers have it. Optimizers count on it."""
    module.register_parameter(name, weight)
    known = order or (tuple(module._flat_weights_names) if isinstance(module, nn.RNNBase) else ())
    place = {key: i for i, key in enumerate(known)}
    keys = sorted(module._parameters, key=lambda key: (place.get(key, len(place)), "bias" in key))
    ordered = {key: module._parameters[key] for key in keys}
    module._parameters.clear()
    module._parameters.update(ordered)
    if isinstance(module, nn.RNNBase) and not split_names(module):
        module._init_flat_weights()


def split_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights of this very module that are computed."""
    return tuple(module.__dict__.get("_weight_norm", ())) if isinstance(module, WeightNormLayer) else ()


def spec_of(module: nn.Module, name: str) -> Spec:
    """How a computed weight is split."""
    spec: Spec = module.__dict__["_weight_norm"][name]
    return spec


def settle(module: nn.Module) -> None:
    """Re-split every weight that somebody wrote into since it was handed out."""
    for name, read in _READS.pop(module, {}).items():
        g, v = (module._parameters[key] for key in spell(name, "legacy"))
        if g is not read.g or v is not read.v or _versions(read.g, read.v) != read.versions:
            continue  # trained or loaded since: the weight handed out is history
        with torch.no_grad():
            if not torch.equal(_compute(module, name), read.weight):
                _assign(module, name, read.weight)


def reduced_axes(axis: Axis, rank: int, groups: int) -> tuple[int, ...] | None:
    """The axes to sum over, on the weight seen in groups; None for all of a plain weight."""
    rank += groups > 1
    kept = kept_axes(axis, rank)
    return None if axis is None else tuple(i for i in range(rank) if i not in kept)


_SUBCLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _subclass(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    if (base, names) not in _SUBCLASSES:
        _SUBCLASSES[base, names] = _make_subclass(base, names)
    return _SUBCLASSES[base, names]


def _make_subclass(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    mixin = _RecurrentLayer if issubclass(base, nn.RNNBase) else WeightNormLayer
    namespace: dict[str, Any] = {name: _weight_property(name) for name in names}
    # Same module as the base, so that torch.fx keeps the layer as a leaf where it keeps the base.
    namespace |= {"__module__": base.__module__, "__qualname__": f"WeightNorm{base.__qualname__}"}
    return type(f"WeightNorm{base.__name__}", (mixin, base), namespace)


def _base(cls: type[nn.Module]) -> type[nn.Module]:
    return cls.__bases__[1] if issubclass(cls, WeightNormLayer) else cls


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _subclass(base, tuple(sorted(names)))
    return cls.__new__(cls)


def _weight_property(name: str) -> property:
    def weight(self: nn.Module) -> Tensor:
        return _read(self, name)

    return property(weight, doc=f"g * v / ||v|| of {name}_g and {name}_v, computed on each read.")


def _read(module: nn.Module, name: str) -> Tensor:
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return _compute(module, name)
    if module in _READS:
        settle(module)
    weight = _compute(module, name)
    g, v = (module._parameters.get(key) for key in spell(name, "legacy"))
    # Reads inside a forward pass are many, and nobody writes to a weight there. A tracer's stand-in is no tensor.
    if sys._getframe(2).f_code.co_name != "forward" and isinstance(weight, Tensor) and g is not None and v is not None:
        versions = _versions(g, v)
        if versions is not None:
            _READS.setdefault(module, {})[name] = _Read(g, v, versions, weight)
    return weight


def _compute(module: nn.Module, name: str) -> Tensor:
    g_name, v_name = spell(name, "legacy")
    g, v = getattr(module, g_name), getattr(module, v_name)
    spec = spec_of(module, name)
    like = module._parameters.get(v_name)
    if spec.groups == 1:
        return weightnorm.compose(g, v, spec.reduced, like=like)
    # Dynamic sizes are left to the view: the group count is all that is fixed.
    grouped = v.unflatten(0, (spec.groups, -1))
    return weightnorm.compose(g, grouped, spec.reduced, like=like if v is not like else None).flatten(0, 1)


def _as_parameter(module: nn.Module, name: str) -> Tensor:
    """Compute a weight, and mark it as trainable where the parameter that it stands for would be.

    torch's recurrent kernel on CPU takes another path for weights that do not require gradients, even under no_grad,
    and that path rounds differently.
    """
    weight = _compute(module, name)
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
        return weight
    return weight.requires_grad_(getattr(module, spell(name, "legacy")[1]).requires_grad)


def _assign(module: nn.Module, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"cannot assign {type(value).__name__} as {name!r}: a split weight takes a tensor of its shape")
    spec = spec_of(module, name)
    g, v = (module.get_parameter(key) for key in spell(name, "legacy"))
    if value.shape != v.shape:
        raise ValueError(f"cannot assign shape {list(value.shape)} as {name!r} of shape {list(v.shape)}: fold first")
    _READS.get(module, {}).pop(name, None)
    new_g, new_v = weightnorm.split(value.detach().to(v.dtype), spec.axis, groups=spec.groups, name=name)
    with torch.no_grad():
        g.copy_(new_g)
        v.copy_(new_v)


def _translate_keys(module: nn.Module, name: str, state: dict[str, Any], prefix: str, *, errors: list[str]) -> None:
    """Bring the plain or parametrized keys of one weight into the legacy spelling, in place."""
    full, expected = prefix + name, module.get_parameter(spell(name, "legacy")[1])
    g_key, v_key = spell(full, "legacy")
    for old, new in zip(spell(full, "parametrized"), (g_key, v_key), strict=True):
        if old in state:
            state[new] = state.pop(old)
    plain = state.get(full)
    if not isinstance(plain, Tensor) or g_key in state or v_key in state:
        return
    state[v_key] = state.pop(full)
    if plain.shape != expected.shape:
        return  # torch names the key and both shapes
    spec = spec_of(module, name)
    try:
        pair = weightnorm.split(plain.detach().to(expected.dtype), spec.axis, groups=spec.groups, name=full)
    except NotSplittable as error:
        errors.append(f"{full} cannot be split: {error}")
    else:
        state[g_key], state[v_key] = pair


def _versions(g: Tensor, v: Tensor) -> tuple[int, int] | None:
    return None if g.is_inference() or v.is_inference() else (g._version, v._version)
