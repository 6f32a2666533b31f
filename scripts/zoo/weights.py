"""Weights for untrained networks: cheap to make, the same on every run, and with nothing trivial in them."""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

POOL = 1048573
"""A prime number of random values, so that rows of a weight taken from them in turn do not repeat."""

SMALL = 4096
"""Tensors up to this size are initialised as their library does it: that is quick, and tells scales from offsets."""

_RANDOM = {
    *("normal_", "uniform_", "random_", "erfinv_", "exponential_", "bernoulli_"),
    *("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "trunc_normal_"),
}


class CheapInit(TorchFunctionMode):
    """Leave large tensors uninitialised where a library would fill them with random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and target.numel() > SMALL:
                return target
        return func(*args, **kwargs)


@contextlib.contextmanager
def cheap_init() -> Iterator[None]:
    """Build networks without the time that random numbers take, the same on every run."""
    torch.manual_seed(0)
    # These two look at the numbers that they have drawn, and would wait forever.
    slow = {name: getattr(nn.init, name) for name in ("orthogonal_", "_no_grad_trunc_normal_")}
    for name in slow:
        setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    try:
        with CheapInit():
            yield
    finally:
        for name, function in slow.items():
            setattr(nn.init, name, function)


@functools.cache
def _pool() -> Tensor:
    return torch.randn(POOL, generator=torch.Generator().manual_seed(0))


def noise_(tensor: Tensor, name: str, scale: float, *, add: bool = False) -> Tensor:
    """Fill a tensor with seeded noise of this standard deviation, or add that to it, at the speed of copying."""
    if not tensor.is_contiguous():
        return tensor.copy_(noise_(tensor.contiguous(), name, scale, add=add))
    pool, flat = _pool().to(tensor.dtype), tensor.view(-1)
    start, offset = 0, zlib.crc32(name.encode()) % POOL
    while start < flat.numel():
        size = min(POOL - offset, flat.numel() - start)
        target, values = flat[start : start + size], pool[offset : offset + size]
        if add:
            target.add_(values, alpha=scale)
        else:
            torch.mul(values, scale, out=target)
        start, offset = start + size, 0
    return tensor


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every parameter and running statistic values under which activations stay finite and no layer is trivial."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            _fill_parameter(parameter, name)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            noise_(buffer, name, 0.1)
        elif name.endswith("running_var"):
            noise_(buffer, name, 0.1).abs_().add_(0.8)


def _fill_parameter(parameter: Tensor, name: str) -> None:
    if not parameter.numel():
        return
    sizes = [size for size in parameter.shape if size > 1]
    if len(sizes) > 1:
        noise_(parameter, name, 1 / math.sqrt(max(1, parameter.numel() // parameter.shape[0])))
        return
    # A scale is near 1 and an offset near 0; both keep that, and layers that start at 0 or 1e-6 come alive.
    centre = parameter.clone()
    centre[~centre.isfinite()] = 0
    tiny = bool((centre.abs() < 0.1).all()) and any(word in name.lower() for word in ("gamma", "scale", "lambda", "ls"))
    noise_(parameter, name, 0.1).add_(torch.ones_like(centre) if tiny else centre.clamp(-8, 8))


@torch.no_grad()
def train(parameters: Mapping[str, Tensor]) -> None:
    """Move magnitudes and directions the way a few steps of training would."""
    for name, parameter in parameters.items():
        step = f"step {name}"
        if name.endswith("_g"):
            parameter.mul_(noise_(torch.empty(parameter.shape, dtype=parameter.dtype), step, 0.05).add_(1))
        else:
            noise_(parameter, step, 0.05 * float(parameter.reshape(-1)[:SMALL].abs().mean()), add=True)


@torch.no_grad()
def jitter(parameters: Mapping[str, Tensor]) -> None:
    """Move every value by one ulp, up or down."""
    for name, parameter in parameters.items():
        directions = noise_(torch.empty(parameter.shape, dtype=parameter.dtype), f"jitter {name}", 1)
        parameter.copy_(torch.nextafter(parameter, directions.sign_().mul_(float("inf"))))


Stamp = dict[str, tuple[int, int]]
"""Of a state dict: where each tensor lies and how often it was written to."""


def stamp(model: nn.Module) -> Stamp:
    """Note the memory and version of every tensor of a network: a cheap way to see that it was left alone."""
    return {key: (t.data_ptr(), t._version) for key, t in model.state_dict(keep_vars=True).items()}


Digest = dict[str, tuple[Any, ...]]
"""Of a state dict: its keys in order, and for each the dtype, shape and checksum of its bytes."""


def digest(model: nn.Module) -> Digest:
    """Digest the state dict of a network, without a copy of it."""
    found: Digest = {}
    for key, value in model.state_dict().items():
        found[key] = (str(value.dtype), tuple(value.shape), checksum(value)) if isinstance(value, Tensor) else (value,)
    return found


def checksum(tensor: Tensor) -> int:
    """Checksum of the bytes of a tensor, in logical order."""
    if tensor.is_meta:
        return 0
    plain = tensor.detach().resolve_conj().contiguous().view(-1)
    return zlib.crc32(memoryview(plain.view(torch.uint8).numpy()) if plain.numel() else b"")


def differences(before: Digest, after: Digest) -> list[str]:
    """What differs between two digests, in words."""
    found = [f"{key} is gone" for key in before if key not in after]
    found += [f"{key} is new" for key in after if key not in before]
    found += [f"{key} changed" for key in before if key in after and before[key] != after[key]]
    if not found and list(before) != list(after):
        key = next(a for a, b in zip(before, after, strict=True) if a != b)
        found.append(f"the order of the keys changed at {key}")
    return found
