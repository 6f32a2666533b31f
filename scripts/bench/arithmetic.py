"""Time `split` and `fold` against one copy of the weight and against torch's own weight norm."""

from __future__ import annotations

import torch
from timing import medians, print_ratios

from wnconvert import weightnorm

SHAPES = [((4096, 4096), 0), ((4096, 4096), 1), ((512, 512, 7), 0), ((64, 64, 3, 3), 0), ((4096, 4096), None)]


def main() -> None:
    """Print one line per shape and dtype: times as multiples of a copy."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for shape, axis in SHAPES:
            w = torch.randn(shape).to(dtype)
            g, v = weightnorm.split(w, axis)
            trained = g * 1.5
            dim = -1 if axis is None else axis
            times = medians(
                {
                    "clone": w.clone,
                    "split": lambda w=w, axis=axis: weightnorm.split(w, axis),
                    "fold": lambda g=trained, v=v: weightnorm.fold(g, v),
                    "torch": lambda g=trained, v=v, dim=dim: torch._weight_norm(v, g, dim),  # noqa: TID251
                }
            )
            print_ratios(f"{list(shape)} {dtype} axis {axis}", times, "clone")


if __name__ == "__main__":
    main()
