"""Weight normalization inside a live module: its class is swapped for a subclass that computes the weight.

`WeightNorm<Base>` is one cached subclass per base class and set of weight names. It holds parameters `<name>_g` and
`<name>_v` and a property `<name>`. Unlike torch's parametrizations, such a module pickles, deep-copies, loads plain,
legacy and parametrized keys strictly, and cannot be normalized twice by accident.
"""

from __future__ import annotations

import copyreg
import sys
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from wnconvert import eager, handed_out, weightnorm
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

    @classmethod
    def of(cls, kind: str, axis: Axis, groups: int, rank: int) -> Spec:
        """For a weight of this rank, of which `axis` is kept when it is seen in groups."""
        rank += groups > 1
        kept = kept_axes(axis, rank)
        return cls(kind, axis, groups, None if axis is None else tuple(i for i in range(rank) if i not in kept))


_NEW_OBJECT: Any = vars(copyreg)["__newobj__"]
"""What most classes reduce themselves to: a bare object, and its state."""


class WeightNormLayer(nn.Module):
    """What every `WeightNorm<Base>` has in common. Never instantiated; comes first in the bases of the subclass."""

    _weight_norm: dict[str, Spec]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A base class may register its subclasses, or refuse one: ours stands for the base itself and is none of them.
        if "_base_class" not in vars(cls):
            super().__init_subclass__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_weight_norm", ()):
            _assign(self, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        settle(self)
        reduced: tuple[Any, ...] = super().__reduce_ex__(max(protocol, 2))  # type: ignore[assignment]
        function, arguments, *rest = reduced
        own = base_class(type(self)), tuple(self._weight_norm)
        if function is _NEW_OBJECT:
            return (_rebuild, (*own, *arguments[1:]), *rest)
        if function is type(self):
            # Its class reduces itself to a call, which would give it plain weights: the state comes after that.
            return _rebuild_by_call, (*own, *arguments), vars(self)
        raise TypeError(f"{own[0].__name__} pickles itself in a way of its own: wnconvert.fold(model) first")

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        settle(self)
        return super().named_parameters(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        settle(self)
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        settle(self)
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        handed_out.forget(self)
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
    specs: dict[str, Spec] = module.__dict__.get("_weight_norm", {})
    order = next(iter(specs.values())).order if specs else tuple(module._parameters)
    # The one step that the base class can make fail comes before any change.
    cls = subclass(base_class(type(module)), (*specs, name))
    del module._parameters[name]
    module.__dict__["_weight_norm"] = {**specs, name: spec._replace(order=order)}
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)
    module.__class__ = cls
    # After the bias, as torch has it: optimizer state counts parameters in this order.
    for key, parameter in zip(spell(name, "legacy"), (g, v), strict=True):
        module.register_parameter(key, parameter)


def obstacle(module: nn.Module, name: str) -> str | None:
    """Why a plain weight of this very module cannot be split in place, or None."""
    if is_scripted(module):
        return "its layer is TorchScript, which holds its weights itself: convert it by itself"
    if module.get_parameter(name).is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode, so that nobody can train it: replace it by a clone of itself first"
    if wrapper(module):
        return f"its layer has become a {type(module).__name__} since it was split; undo that first"
    taken = next((key for key in spell(name, "legacy") if hasattr(module, key)), None)
    return None if taken is None else f"its layer has a {taken} of its own"


def is_scripted(module: nn.Module) -> bool:
    """Whether this is TorchScript, which keeps its weights in compiled code and has no real dictionaries."""
    return isinstance(module, torch.jit.ScriptModule)


def wrapper(module: nn.Module) -> bool:
    """Whether something else (FSDP, a parametrization) has swapped the class of a split module once more."""
    return isinstance(module, WeightNormLayer) and "_base_class" not in vars(type(module))


def detach(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Put a plain parameter back in the place of a computed weight."""
    left = {key: spec for key, spec in module.__dict__["_weight_norm"].items() if key != name}
    order = spec_of(module, name).order
    cls = subclass(base_class(type(module)), tuple(left))
    handed_out.forget(module, name)
    for key in spell(name, "legacy"):
        del module._parameters[key]
    if left:
        module.__dict__["_weight_norm"] = left
    else:
        del module.__dict__["_weight_norm"]
    module.__class__ = cls
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
    if not handed_out.any_of(module) or any(_is_stand_in(parameter) for parameter in module._parameters.values()):
        return
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes():
            for name, weight in handed_out.written(module):
                _assign(module, name, weight)
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


# While torch.compile traces, settling happens at once and is no part of the graph. This is what
# torch.compiler.assume_constant_result sets; calling that would import the compiler.
settle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_stand_in(parameter: Tensor | None) -> bool:
    """Whether a tracer or functional_call has put something else in the place of a parameter for the time being."""
    return parameter is not None and (isinstance(parameter, FakeTensor) or not isinstance(parameter, nn.Parameter))


_SUBCLASSES: weakref.WeakKeyDictionary[type[nn.Module], dict[tuple[str, ...], type[nn.Module]]]
_SUBCLASSES = weakref.WeakKeyDictionary()


def subclass(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class of modules of class `base` whose weights `names` are computed; `base` itself for no names."""
    if not names:
        return base
    made = _SUBCLASSES.setdefault(base, {})
    names = tuple(sorted(names))
    if names not in made:
        made[names] = _make_subclass(base, names)
    return made[names]


def base_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before it was split."""
    return vars(cls).get("_base_class", cls)  # type: ignore[no-any-return]


def _make_subclass(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    mixin = _RecurrentLayer if issubclass(base, nn.RNNBase) else WeightNormLayer
    namespace: dict[str, Any] = {name: _weight_property(name) for name in names}
    # Same module as the base, so that torch.fx keeps the layer as a leaf where it keeps the base.
    namespace |= {"__module__": base.__module__, "__qualname__": f"WeightNorm{base.__qualname__}", "_base_class": base}
    return type(f"WeightNorm{base.__name__}", (mixin, base), namespace)


def _rebuild(base: type[nn.Module], names: tuple[str, ...], *arguments: Any) -> nn.Module:
    cls = subclass(base, names)
    return cls.__new__(cls, *arguments)


def _rebuild_by_call(base: type[nn.Module], names: tuple[str, ...], *arguments: Any) -> nn.Module:
    module = base(*arguments)
    vars(module).clear()
    module.__class__ = subclass(base, names)
    return module


def _weight_property(name: str) -> property:
    def weight(self: nn.Module) -> Tensor:
        settle(self)
        found = _as_parameter(self, name)
        if not torch.compiler.is_compiling():
            handed_out.remember(self, name, found, reader=sys._getframe(1))
        return found

    return property(weight, doc=f"g * v / ||v|| of {name}_g and {name}_v, computed on each read.")


def _compute(module: nn.Module, name: str) -> Tensor:
    g_name, v_name = spell(name, "legacy")
    g, v = getattr(module, g_name), getattr(module, v_name)
    return compose(spec_of(module, name), g, v, module._parameters.get(v_name))


def compose(spec: Spec, g: Tensor, v: Tensor, like: Tensor | None) -> Tensor:
    """Compute a weight that is split in this way; `like` as in `weightnorm.compose`."""
    if spec.groups == 1:
        return weightnorm.compose(g, v, spec.reduced, like=like)
    # Dynamic sizes are left to the view: the group count is all that is fixed.
    grouped: Tensor = v.unflatten(0, (spec.groups, -1))  # type: ignore[no-untyped-call]
    return weightnorm.compose(g, grouped, spec.reduced, like=like if v is not like else None).flatten(0, 1)


def _as_parameter(module: nn.Module, name: str) -> Tensor:
    """Compute a weight, and mark it as trainable where the parameter that it stands for would be.

    Some of torch's kernels (recurrent ones, matmul) take another path for weights that do not require gradients, even
    under no_grad, and that path rounds differently. So they do for tensors made in inference mode, as a parameter
    seldom is.
    """
    if torch.is_grad_enabled() or not eager.is_plain():
        return _compute(module, name)
    v = getattr(module, spell(name, "legacy")[1])
    if not torch.is_inference_mode_enabled() or v.is_inference():
        return _compute(module, name).requires_grad_(v.requires_grad)
    with torch.inference_mode(False), torch.no_grad():
        return _compute(module, name).requires_grad_(v.requires_grad)


def _assign(module: nn.Module, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"cannot assign {type(value).__name__} as {name!r}: a split weight takes a tensor of its shape")
    spec = spec_of(module, name)
    g, v = (module.get_parameter(key) for key in spell(name, "legacy"))
    if value.shape != v.shape:
        raise ValueError(f"cannot assign shape {list(value.shape)} as {name!r} of shape {list(v.shape)}: fold first")
    handed_out.forget(module, name)
    try:
        new_g, new_v = weightnorm.split(value.detach().to(v.dtype), spec.axis, groups=spec.groups, name=name)
    except NotSplittable as error:
        raise ValueError(f"cannot split what was written to {name!r}: {error}") from error
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
