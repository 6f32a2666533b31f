"""Split modules under DDP, FSDP2 and tensor parallelism, on two gloo ranks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PRELUDE = """
import sys, torch, torch.distributed as dist
from torch import nn
import wnconvert
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Flatten())
x = torch.randn(4, 8)
wnconvert.apply(model)
plain = wnconvert.fold(__import__("copy").deepcopy(model)).model
expected = plain(x)
"""

BODIES = {
    "DDP": """
        from torch.nn.parallel import DistributedDataParallel
        wrapped = DistributedDataParallel(model)
        assert torch.equal(wrapped(x), expected)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        wrapped(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimizer.step()
        total = model[0].weight_g.detach().clone()
        dist.all_reduce(total)
        assert torch.allclose(total / 2, model[0].weight_g)
        assert not torch.equal(model(x), expected)
    """,
    "FSDP2": """
        from torch.distributed.fsdp import fully_shard
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        out = model(x)
        assert torch.allclose(out, expected, atol=1e-6), (out - expected).abs().max()
        out.square().mean().backward()
        optimizer.step()
        reference = wnconvert.apply(plain).model
        plain_optimizer = torch.optim.SGD(reference.parameters(), 0.1)
        reference(x).square().mean().backward()
        plain_optimizer.step()
        assert torch.allclose(model(x), reference(x), atol=1e-5)
        full = {name: t.full_tensor() for name, t in model.state_dict().items()}
        assert list(full) == list(reference.state_dict())
    """,
    "DTensor": """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[2]):
            for name in ("weight_g", "weight_v", "bias"):
                sharded = distribute_tensor(getattr(layer, name).detach(), mesh, [Shard(0)])
                setattr(layer, name, nn.Parameter(sharded))
        out = model(distribute_tensor(x, mesh, [Replicate()])).full_tensor()
        assert torch.allclose(out, expected, atol=1e-6)
    """,
}


@pytest.mark.parametrize("body", BODIES)
def test_on_two_ranks(body: str, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(PRELUDE + textwrap.dedent(BODIES[body]) + "\ndist.destroy_process_group()\nprint('done')\n")
    command = [sys.executable, str(script)]
    root = Path(__file__).parents[1]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, cwd=root, env={"PYTHONPATH": str(root), "PATH": "", "OMP_NUM_THREADS": "1"})
        for rank in (0, 1)
    ]  # fmt: skip
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert out.strip() == "done", err
