"""The same bits on a GPU: the arithmetic uses elementwise float64 operations only, which IEEE 754 fixes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wnconvert
from tests import reference
from wnconvert import weightnorm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


@dtypes
@pytest.mark.parametrize("axis", [0, 1, (0, 2), None], ids=str)
def test_split_and_fold_give_the_bits_of_the_cpu(dtype: torch.dtype, axis: weightnorm.Axis) -> None:
    w = torch.randn(70, 33, 19, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    w[3] = 0
    g, v = weightnorm.split(w, axis)
    on_gpu = weightnorm.split(w.cuda(), axis)
    assert reference.same_bits(on_gpu[0].cpu(), g)
    assert reference.same_bits(on_gpu[1].cpu(), v)
    for factor in (1, 1.5, -0.3):
        folded = weightnorm.fold(on_gpu[0] * factor, on_gpu[1])
        assert folded.is_cuda
        assert reference.same_bits(folded.cpu(), weightnorm.fold(on_gpu[0].cpu() * factor, v))


@dtypes
def test_the_training_forward_agrees_with_fold(dtype: torch.dtype) -> None:
    w = torch.randn(256, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).cuda()
    g, v = weightnorm.split(w, 0)
    assert reference.same_bits(weightnorm.compose(g, v, (1,)).cpu(), w.cpu())
    g = g * 1.37
    found, expected = weightnorm.compose(g, v, (1,)).cpu(), weightnorm.fold(g, v).cpu()
    assert reference.ulp(found, expected) <= (2 if dtype == torch.float64 else 1)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Linear(64, 32), (8, 64)),
        (lambda: nn.Conv1d(16, 32, 5), (2, 16, 40)),
        (lambda: nn.LSTM(16, 24, 2, bidirectional=True), (7, 3, 16)),
        (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (2, 9, 32)),
    ],
    ids=["Linear", "Conv1d", "LSTM", "TransformerEncoderLayer"],
)
def test_a_module_on_the_gpu_trains_and_comes_back(build: object, shape: tuple[int, ...]) -> None:
    module = build().cuda().eval()  # type: ignore[operator]
    before, x = copy.deepcopy(module.state_dict()), torch.randn(shape, device="cuda")

    def run() -> torch.Tensor:
        out = module(x)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        expected = run()
    wnconvert.apply(module)
    with torch.no_grad():
        assert torch.allclose(run(), expected, atol=1e-5)
    module.train()
    run().square().mean().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    wnconvert.fold(module)
    after = module.state_dict()
    assert all(reference.same_bits(after[name].cpu(), before[name].cpu()) for name in before)
