"""Write a large checkpoint with little memory, as a process: scripts/bench/checkpoint_files.py --help.

A HiFi-GAN generator and as many transformer blocks as fit. All tensors show parts of one block of random numbers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WIDTHS = {0.5: (512, 1376), 2: (1024, 2752), 8: (2048, 5504)}
"""Hidden and inner width of a transformer by the largest size in gigabytes that it is for."""
_LARGEST = (4096, 14336)

Shape = tuple[int, ...]


def shapes(size: float, itemsize: int) -> dict[str, Shape]:
    """Names and shapes of about `size` bytes."""
    hidden, inner = next((widths for limit, widths in _WIDTHS.items() if size < limit * 1e9), _LARGEST)
    found: dict[str, Shape] = {}
    held = 0
    for name, shape in [*_vocoder(), ("model.embed_tokens.weight", (8 * hidden, hidden))]:
        found[name] = shape
        held += int(np.prod(shape)) * itemsize
    block = 0
    while held < size:
        for name, shape in _block(hidden, inner):
            found[f"model.layers.{block}.{name}"] = shape
            held += int(np.prod(shape)) * itemsize
        block += 1
    return found


def tiny_shapes(count: int) -> dict[str, Shape]:
    """Names and shapes of `count` layers of a few values, without biases."""
    return {f"layers.{i}.linear.weight": (4, 4) for i in range(count)}


def split_shapes(plain: dict[str, Shape]) -> dict[str, Shape]:
    """The same with a pair for every weight of a Linear or convolution, in torch's legacy names."""
    found: dict[str, Shape] = {}
    for name, shape in plain.items():
        if is_layer(name, shape):
            found |= {f"{name}_g": (shape[0], *(1 for _ in shape[1:])), f"{name}_v": shape}
        else:
            found[name] = shape
    return found


def is_layer(name: str, shape: Shape) -> bool:
    """Whether a tensor of these files is the weight of a Linear or convolution."""
    return name.endswith(".weight") and len(shape) > 1 and "embed" not in name


def _block(hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield "input_layernorm.weight", (hidden,)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield f"self_attn.{name}.weight", (hidden, hidden)
    yield "post_attention_layernorm.weight", (hidden,)
    for name in ("gate_proj", "up_proj"):
        yield f"mlp.{name}.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)


def _vocoder() -> Iterator[tuple[str, Shape]]:
    yield from _convolution("conv_pre", (512, 80, 7))
    for i, kernel in enumerate((16, 16, 4, 4)):
        inputs, outputs = 512 >> i, 256 >> i
        yield f"generator.ups.{i}.weight", (inputs, outputs, kernel)
        yield f"generator.ups.{i}.bias", (outputs,)
        for j, width in enumerate((3, 7, 11)):
            for part in ("convs1", "convs2"):
                for k in range(3):
                    yield from _convolution(f"resblocks.{3 * i + j}.{part}.{k}", (outputs, outputs, width))
    yield from _convolution("conv_post", (1, 32, 7))


def _convolution(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"generator.{name}.weight", shape
    yield f"generator.{name}.bias", (shape[0],)


class _Numbers:
    """Random numbers of a dtype: every array shows another part of one block."""

    def __init__(self, found: dict[str, Shape], dtype: str) -> None:
        values = np.random.default_rng(0).standard_normal(
            max(int(np.prod(shape)) for shape in found.values()) + 4096, np.float32
        )
        values *= 0.02
        if dtype == "bfloat16":
            self._block: np.ndarray[Any, Any] = (values.view(np.uint32) >> 16).astype(np.uint16)
        else:
            self._block = values.astype(dtype)
        # A magnitude is positive, and never the norm of its direction.
        self._positive = self._block[:65536].copy()
        if dtype == "bfloat16":
            self._positive &= 0x7FFF
        else:
            np.abs(self._positive, out=self._positive)

    def of(self, i: int, name: str, shape: Shape) -> np.ndarray[Any, Any]:
        start, count = 13 * i % 4096, int(np.prod(shape))
        if name.endswith("_g"):
            return self._positive[:count].reshape(shape)
        return self._block[start : start + count].reshape(shape)


def write_safetensors(path: Path, found: dict[str, Shape], dtype: str) -> None:
    """Write the header, then one tensor after the other."""
    numbers, header, at = _Numbers(found, dtype), {}, 0
    for name, shape in found.items():
        size = int(np.prod(shape)) * DTYPES[dtype]
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (at, at + size)}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i, (name, shape) in enumerate(found.items()):
            file.write(numbers.of(i, name, shape).data)


def write_torch(path: Path, found: dict[str, Shape], dtype: str) -> None:
    """Let torch.save write storages of their own that lie in the same memory."""
    import torch

    numbers = _Numbers(found, dtype)
    state = {
        name: torch.frombuffer(numbers.of(i, name, shape).reshape(-1), dtype=getattr(torch, dtype)).reshape(shape)
        for i, (name, shape) in enumerate(found.items())
    }
    torch.save(state, path)


WRITERS = {"safetensors": write_safetensors, "torch": write_torch}
SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt"}


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--gb", default=0.1, show_default=True, help="About this size.")
@click.option("--layers", type=int, help="This many tiny layers instead.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(list(DTYPES)))
@click.option("--format", "kind", default="safetensors", show_default=True, type=click.Choice(list(WRITERS)))
@click.option("--split", is_flag=True, help="Pairs of g and v that look trained, instead of weights.")
def main(path: Path, *, gb: float, layers: int | None, dtype: str, kind: str, split: bool) -> None:
    """Write a checkpoint to PATH."""
    found = shapes(gb * 1e9, DTYPES[dtype]) if layers is None else tiny_shapes(layers)
    WRITERS[kind](path, split_shapes(found) if split else found, dtype)


if __name__ == "__main__":
    main()
