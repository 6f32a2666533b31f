"""TorchScript archives. What torch itself loads, runs and multiplies is the reference."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm as legacy
from torch.nn.utils.parametrizations import weight_norm as parametrized

import wnconvert
from tests import reference
from tests.models import model_file
from wnconvert.cli import main
from wnconvert.errors import InputError, NothingToDo, PairError, UsageError
from wnconvert.sites import Site

Norm = Callable[..., nn.Module]


class Net(nn.Module):
    def __init__(self, norm: Norm, dim: int | None = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(norm(nn.Conv1d(2, 4, 3), dim=dim), nn.ReLU(), norm(nn.Conv1d(4, 3, 1), dim=dim))
        self.up = norm(nn.ConvTranspose1d(3, 2, 3, bias=False), dim=dim)
        self.fc = norm(nn.Linear(5, 4), dim=dim)
        self.plain = nn.Linear(4, 4)
        self.register_buffer("scale", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.fc(self.up(self.layers(x)))) * self.scale


class HandMade(nn.Module):
    """A layer whose author wrote the formula."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.rand(outputs, 1) + 1)
        self.weight_v = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.steps = 3

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight_g * self.weight_v / torch.norm(self.weight_v, 2, dim=[1], keepdim=True)
        return F.linear(x, w, self.bias)


class Branching(nn.Module):
    """What only a script keeps: branches on the input, loops, several methods, attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([HandMade(4, 4) for _ in range(3)])
        self.head = HandMade(4, 2)
        self.names = ["a", "b"]
        self.table = {"x": torch.ones(2)}

    def forward(self, x: Tensor, deep: bool = True) -> Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))
        if x.sum() > 0 and deep:
            x = self.blocks[0](x)
        return self.head(x) * self.table["x"]

    @torch.jit.export
    def features(self, x: Tensor) -> Tensor:
        w = self.head.weight_v * (self.head.weight_g / self.head.weight_v.norm(2, [1], True))
        return x @ w.t()


def trained(module: nn.Module) -> nn.Module:
    """With magnitudes that no longer are the norms."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("_g", "original0")):
                parameter.mul_(1 + torch.rand_like(parameter))
    return module.eval()


def traced(norm: Norm, dim: int | None = 0) -> torch.jit.ScriptModule:
    return torch.jit.trace(trained(Net(norm, dim)), torch.randn(2, 2, 5))


def scripted() -> torch.jit.ScriptModule:
    return torch.jit.script(trained(Branching()))


def saved(module: Any, folder: Path, **extra: Any) -> Path:
    path = folder / "model.jit"
    torch.jit.save(module, path, **extra)
    return path


def folded(path: Path, **options: Any) -> torch.jit.ScriptModule:
    report = wnconvert.convert_file(path, command="fold", **options)
    assert report.weights_verified or not options.get("check", True)
    return torch.jit.load(report.output)


def expected_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with every pair multiplied by the reference."""
    state = {name: value.detach() for name, value in module.state_dict().items()}
    for name in list(state):
        for g_end, v_end in (("_g", "_v"), ("original0", "original1")):
            if name.endswith(g_end):
                g, v = state.pop(name), state.pop(name.removesuffix(g_end) + v_end)
                kept = tuple(i for i, n in enumerate(g.shape) if n != 1) if g.dim() else None
                if g.dim() and g.numel() == 1:
                    kept = (0,) if v.shape[0] == 1 else None
                plain = name.removesuffix(g_end).replace("parametrizations.", "").rstrip(".")
                state[plain] = reference.fold(g.reshape(()) if kept is None else g, v, kept)
    return state


def code_of(path: str | Path) -> str:
    with zipfile.ZipFile(path) as archive:
        return "\n".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".py"))


def assert_folded(module: nn.Module, result: torch.jit.ScriptModule) -> None:
    wanted, found = expected_state(module), result.state_dict()
    assert wanted.keys() == found.keys()
    for name in wanted:
        # The reference rounds a float64 weight as often as the tool does, but in another order.
        near = wanted[name].dtype == torch.float64 and reference.ulp(wanted[name], found[name].detach()) <= 4
        assert near or reference.same_bits(wanted[name], found[name].detach()), name
    graphs = "".join(
        str(m._c._get_method(name).inlined_graph) for m in result.modules() for name in m._c._method_names()
    )
    assert "_weight_norm" not in graphs
    assert "norm" not in graphs.replace("_is_normal", "")


@pytest.mark.parametrize("dim", [0, 1, None], ids=str)
@pytest.mark.parametrize("norm", [legacy, parametrized], ids=["legacy", "parametrized"])
def test_a_traced_network_folds(norm: Norm, dim: int | None, tmp_path: Path) -> None:
    module = traced(norm, dim)
    path, x = saved(module, tmp_path), torch.randn(2, 2, 5)

    result = folded(path)

    assert_folded(module, result)
    torch.testing.assert_close(result(x), module(x))
    assert [name for name, _ in result.named_children()] == ["layers", "up", "fc", "plain"]
    kept = [m.original_name for name, m in module.named_modules() if "parametrizations" not in name]
    assert [m.original_name for m in result.modules()] == kept
    assert all(parameter.requires_grad for parameter in result.parameters())
    assert dict(result.named_buffers()).keys() == {"scale"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_gives_the_bits_of_the_reference(dtype: torch.dtype, tmp_path: Path) -> None:
    module = torch.jit.trace(trained(parametrized(nn.Linear(7, 5)).to(dtype)), torch.randn(2, 7).to(dtype))

    assert_folded(module, folded(saved(module, tmp_path)))


def test_a_scripted_network_folds_in_all_its_methods(tmp_path: Path) -> None:
    module = scripted()
    x = torch.randn(5, 4)

    result = folded(saved(module, tmp_path))

    assert_folded(module, result)
    torch.testing.assert_close(result(x), module(x))
    torch.testing.assert_close(result(x, False), module(x, False))
    torch.testing.assert_close(result.features(x), module.features(x))
    assert result.names == ["a", "b"]
    blocks = list(result.blocks.children())
    assert [block.steps for block in blocks] == [3, 3, 3]
    # They shared one class and still do.
    assert len({block._c._type().qualified_name() for block in blocks}) == 1


def test_scripting_a_parametrized_module_never_ran_and_runs_folded(tmp_path: Path) -> None:
    module = trained(Net(parametrized))
    script, x = torch.jit.script(module), torch.randn(2, 2, 5)
    with pytest.raises(torch.jit.Error, match="not working with scripting"):
        script(x)

    result = folded(saved(script, tmp_path))

    assert_folded(script, result)
    torch.testing.assert_close(result(x), module(x))


def test_one_of_several_objects_of_a_class_folds_alone(tmp_path: Path) -> None:
    module, x = scripted(), torch.randn(5, 4)

    result = folded(saved(module, tmp_path), include="blocks.1.*")

    names = result.state_dict().keys()
    assert {"blocks.1.weight", "blocks.0.weight_g", "blocks.2.weight_v", "head.weight_g"} <= names
    assert not {"blocks.1.weight_g", "blocks.1.weight_v", "blocks.0.weight"} & names
    torch.testing.assert_close(result(x), module(x))
    torch.testing.assert_close(result.features(x), module.features(x))
    again = folded(saved(result, tmp_path), overwrite=True)
    assert_folded(module, again)
    torch.testing.assert_close(again(x), module(x))


def test_our_own_layers_fold_from_a_trace(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 1))
    wnconvert.apply(module)
    module = torch.jit.trace(trained(module), torch.randn(2, 2, 5))
    x = torch.randn(2, 2, 5)

    result = folded(saved(module, tmp_path))

    assert_folded(module, result)
    torch.testing.assert_close(result(x), module(x))


def test_everything_else_in_the_archive_stays(tmp_path: Path) -> None:
    path = saved(traced(legacy), tmp_path, _extra_files={"labels.txt": "a\nb", "deep/er.bin": "c"})

    report = wnconvert.convert_file(path, command="fold")

    extra = {"labels.txt": "", "deep/er.bin": ""}
    torch.jit.load(report.output, _extra_files=extra)
    assert extra == {"labels.txt": b"a\nb", "deep/er.bin": b"c"}
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(report.output) as after:
        kept = set(before.namelist()) & set(after.namelist())
        changed = {name for name in kept if before.read(name) != after.read(name)}
        assert all(name.endswith((".py", "/data.pkl")) for name in changed)
        assert {f"model/{name}" for name in ("version", "constants.pkl", "extra/labels.txt")} <= kept
        for info in after.infolist():
            # Where torch can map it.
            after.fp.seek(info.header_offset + 26)
            name, more = (int.from_bytes(after.fp.read(2), "little") for _ in range(2))
            assert (info.header_offset + 30 + name + more) % 64 == 0


def test_a_layer_used_twice_and_tied_weights_fold_once(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = HandMade(4, 4), HandMade(4, 4), HandMade(4, 4)
            self.again = self.one
            self.two.weight_g, self.two.weight_v = self.one.weight_g, self.one.weight_v

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.again(self.two(self.one(x))))

    module, x = torch.jit.script(trained(Shared().double())), torch.randn(2, 4, dtype=torch.float64)
    path = saved(module, tmp_path)
    sites = wnconvert.find(torch.jit.load(path))
    result = folded(path)

    assert {site.name: sorted(site.tied) for site in sites} == {
        "one.weight": ["again.weight", "two.weight"],
        "three.weight": [],
    }
    assert_folded(module, result)
    torch.testing.assert_close(result(x), module(x))
    assert reference.same_bits(result.one.weight, result.two.weight)


def test_names_of_the_pair_may_be_anything(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size, self.direction = nn.Parameter(torch.rand(3, 1) + 1), nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, F.normalize(self.direction, dim=1) * self.size)

    module, x = torch.jit.script(Odd()), torch.randn(2, 4)
    result = folded(saved(module, tmp_path))

    assert list(result.state_dict()) == ["direction"]
    wanted = reference.fold(module.size, module.direction, (0,))
    assert reference.same_bits(wanted.detach(), result.direction.detach())
    torch.testing.assert_close(result(x), module(x))


def test_a_direction_with_another_use_is_left_alone_with_the_reason(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = HandMade(4, 4), HandMade(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + x * self.a.weight_v.mean()

    path = saved(torch.jit.script(trained(Both())), tmp_path)
    report = wnconvert.convert_file(path, command="fold")

    reasons = {row.site.name: row.reason for row in report.rows}
    assert reasons["b.weight"] is None
    assert reasons["a.weight"] is not None
    assert "a.weight_v" in reasons["a.weight"]
    assert {"a.weight_g", "b.weight"} <= torch.jit.load(report.output).state_dict().keys()


def scale(v: Tensor, g: Tensor) -> Tensor:
    return v * (g / v.pow(2).sum(1, keepdim=True).sqrt())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.randn(4, 4))
        self.weight_g = nn.Parameter(torch.rand(4, 1) + 1)
        self.more_v = nn.Parameter(torch.randn(4, 4))
        self.more_g = nn.Parameter(torch.rand(4, 1) + 1)


class ByHelper(Pair):
    """One helper for two weights, which gets the pair as arguments."""

    def product(self, v: Tensor, g: Tensor) -> Tensor:
        return scale(v, g)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.product(self.weight_v, self.weight_g)), scale(self.more_v, self.more_g))


class InBranches(Pair):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            if x.sum() > 0:
                w = torch._weight_norm(self.weight_v, self.weight_g, 0)
                x = F.linear(x, w)
            else:
                x = F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))
        return F.linear(x, scale(self.more_v, self.more_g))


class KeepsAWeight(Pair):
    """As the hook does: the product is an attribute, stale until the next forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.zeros(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        return F.linear(F.linear(x, self.weight), scale(self.more_v, self.more_g))


@pytest.mark.parametrize("kind", [ByHelper, InBranches, KeepsAWeight])
def test_formulas_in_unusual_places(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, x = torch.jit.script(kind()), torch.randn(3, 4)
    result = folded(saved(module, tmp_path))
    assert set(result.state_dict()) == {"weight", "more"}
    assert_folded(module, result)
    for sign in (1, -1):
        torch.testing.assert_close(result(sign * x), module(sign * x))


class OnlyInEval(Pair):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight_v if self.training else torch._weight_norm(self.weight_v, self.weight_g, 0)
        return F.linear(F.linear(x, w), scale(self.more_v, self.more_g))


def test_a_pair_that_a_branch_reads_raw_is_left_alone(tmp_path: Path) -> None:
    module = torch.jit.script(OnlyInEval())
    report = wnconvert.convert_file(saved(module, tmp_path), command="fold")
    assert {row.site.name: row.reason for row in report.rows} == {
        "weight": "weight_v is also used by a condition",
        "more": None,
    }


class NamesAMethodSo(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, scale(self.weight_v, self.weight_g)), self.more())

    def more(self) -> Tensor:
        return scale(self.more_v, self.more_g)


def test_a_weight_cannot_take_the_name_of_a_method(tmp_path: Path) -> None:
    report = wnconvert.convert_file(saved(torch.jit.script(NamesAMethodSo()), tmp_path), command="fold")
    reasons = {row.site.name: row.reason for row in report.rows}
    assert reasons == {"weight": None, "more": "more is the name of a method of NamesAMethodSo"}


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, copies: int = 1) -> None:
        super().__init__()
        self.inner, self.copies = inner, copies

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*[x] * self.copies)[0]


def test_recurrent_and_attention_layers_fold_from_a_trace(tmp_path: Path) -> None:
    attention = parametrized(nn.MultiheadAttention(8, 2), "in_proj_weight")
    recurrent = legacy(legacy(nn.LSTM(8, 4), "weight_hh_l0"), "weight_ih_l0")
    for inner, copies in ((attention, 3), (recurrent, 1)):
        # In training mode: the fast path of attention takes no parametrized weight.
        x = torch.randn(5, 1, 8)
        module = torch.jit.trace(trained(Wrapped(inner, copies)).train(), x, check_trace=False).eval()
        result = folded(saved(module, tmp_path), overwrite=True)
        assert_folded(module, result)
        torch.testing.assert_close(result(x), module(x))


def test_silero_shows_two_networks(tmp_path: Path) -> None:
    path = model_file("silero-vad", "silero_vad/data/silero_vad.jit")
    sites = {site.name: site for site in wnconvert.find(torch.jit.load(path))}
    code, out = main(["inspect", str(path), "--json"]), None

    assert code == 0
    assert out is None
    for net, bins, kernel in (("_model", 129, 256), ("_model_8k", 65, 128)):
        stft = sites[f"{net}.stft.forward_basis_buffer"]
        assert (stft.kind, stft.shape, stft.axis) == ("conv1d", (2 * bins, 1, kernel), 0)
        assert "buffer" in (stft.skip or "")
        encoder = [sites[f"{net}.encoder.{i}.reparam_conv.weight"] for i in range(4)]
        assert [(s.kind, s.axis, s.skip) for s in encoder] == [("Conv1d", 0, None)] * 4
        assert [s.shape for s in encoder] == [(128, bins, 3), (64, 128, 3), (64, 64, 3), (128, 64, 3)]
        cell = [sites[f"{net}.decoder.rnn.weight_{part}"] for part in ("ih", "hh")]
        assert [(s.kind, s.shape) for s in cell] == [("RNNCell", (512, 128))] * 2
        assert sites[f"{net}.decoder.decoder.2.weight"].kind == "Conv1d"
    assert len(sites) == 16
    with pytest.raises(NothingToDo):
        wnconvert.convert_file(path, tmp_path / "out.jit", "fold")


def test_apply_offers_a_way_out_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 3, 2))
    path = saved(torch.jit.trace(plain, torch.randn(1, 2, 6)), tmp_path)

    assert main(["apply", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot carry" in said
    assert list(tmp_path.iterdir()) == [path]

    command = said.partition("`wnconvert ")[2].partition("`")[0].split()
    assert main(command) == 0
    fresh = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 3, 2))
    wnconvert.load_into(fresh, tmp_path / "model.wn.safetensors")
    assert type(fresh[0]).__name__ == "WeightNormConv1d"
    x = torch.randn(1, 2, 6)
    assert reference.same_bits(fresh(x), plain(x))
    assert wnconvert.verify(path, tmp_path / "model.wn.safetensors").weights.identical


@pytest.mark.parametrize("name", ["out.pth", "out.pt", "out.safetensors"])
def test_the_way_out_keeps_what_is_split_and_takes_both_formats(name: str, tmp_path: Path) -> None:
    module = traced(legacy)
    path = saved(module, tmp_path)

    report = wnconvert.convert_file(path, tmp_path / name, "apply")

    assert report.count("split") == 1
    assert report.weights_verified
    fresh = Net(lambda layer, **_: layer)
    wnconvert.load_into(fresh, tmp_path / name)
    x = torch.randn(2, 2, 5)
    torch.testing.assert_close(fresh(x), module(x))


@pytest.mark.parametrize("arguments", [["-o", "x.jit"], ["--dry-run"], ["-o", "x.onnx"]])
def test_apply_refuses_what_would_not_be_an_archive(arguments: list[str], tmp_path: Path) -> None:
    path = saved(traced(legacy), tmp_path)
    assert main(["apply", str(path), *arguments]) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_renaming_and_arch_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(traced(legacy), tmp_path)
    assert main(["rename", str(path), "--to", "parametrized"]) == 2
    assert main(["inspect", str(path), "--arch", "timm:resnet18"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_dry_run_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(traced(parametrized), tmp_path)
    assert main(["fold", str(path), "--dry-run", "--json", "--exclude", "up.*"]) == 0
    report = json.loads(capsys.readouterr().out)

    assert list(tmp_path.iterdir()) == [path]
    rows = {site["name"]: (site["kind"], site["action"], site["scheme"]) for site in report["sites"]}
    assert rows == {
        "layers.0.weight": ("Conv1d", "folded", "parametrized"),
        "layers.2.weight": ("Conv1d", "folded", "parametrized"),
        "up.weight": ("ConvTranspose1d", "skipped", "parametrized"),
        "fc.weight": ("Linear", "folded", "parametrized"),
    }
    assert report["format"] == "torchscript"


def test_verify_tells_archives_apart(tmp_path: Path) -> None:
    module = traced(legacy)
    path = saved(module, tmp_path)
    out = Path(str(wnconvert.convert_file(path, command="fold").output))
    torch.save(module.state_dict(), tmp_path / "state.pt")

    verdict = wnconvert.verify(path, out)
    assert verdict.same
    assert verdict.outputs is not None
    assert verdict.outputs.equal
    assert wnconvert.verify(path, tmp_path / "state.pt").weights.identical
    assert wnconvert.verify(tmp_path / "state.pt", out).weights.identical
    with torch.no_grad():
        module.up.weight_g[0] *= 2
    torch.jit.save(module, tmp_path / "other.jit")
    assert not wnconvert.verify(out, tmp_path / "other.jit").same


def test_verify_sees_constants_that_are_no_weights(tmp_path: Path) -> None:
    class Adds(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.offset = torch.full((2,), value)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.offset

    one, two = Adds(1), Adds(2)
    two.fc.load_state_dict(one.fc.state_dict())
    for name, module in (("a.jit", one), ("b.jit", two)):
        torch.jit.save(torch.jit.script(module), tmp_path / name)
    assert not wnconvert.verify(tmp_path / "a.jit", tmp_path / "b.jit").same
    assert wnconvert.verify(tmp_path / "a.jit", tmp_path / "a.jit").same


def test_in_memory(tmp_path: Path) -> None:
    module, x = scripted(), torch.randn(5, 4)
    before = {name: value.clone() for name, value in module.state_dict().items()}

    result = wnconvert.fold(module)

    assert result.report.count("folded") == 4
    assert_folded(module, result.model)
    torch.testing.assert_close(result.model(x), module(x))
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    assert wnconvert.fold(result.model).model is result.model
    with pytest.raises(UsageError, match="cannot carry g and v"):
        wnconvert.apply(result.model)
    assert wnconvert.verify(module, result.model).weights.identical


def test_functional_weights_behind_views_are_found() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4))
            self.kernel = nn.Parameter(torch.randn(4, 2, 3))
            self.table = nn.Parameter(torch.randn(5, 6))
            self.rnn = nn.LSTM(3, 4)

        def forward(self, x: Tensor, i: Tensor) -> Tensor:
            y = F.embedding(i, self.table) @ self.w
            return F.conv_transpose1d(x, self.kernel).sum() + y.sum() + self.rnn(torch.ones(2, 1, 3))[0].sum()

    inputs = (torch.randn(1, 4, 5), torch.tensor([1, 2]))
    for module in (torch.jit.script(Functional()), torch.jit.trace(Functional(), inputs)):
        found: dict[str, Site] = {site.name: site for site in wnconvert.find(module, dim="out")}
        assert {name: site.axis for name, site in found.items()} == {
            "w": 1,
            "kernel": 1,
            "table": 0,
            "rnn.weight_ih_l0": 0,
            "rnn.weight_hh_l0": 0,
        }
        assert found["table"].kind == "Embedding"


def test_frozen_constants_are_listed_and_left_alone(tmp_path: Path) -> None:
    frozen = torch.jit.freeze(torch.jit.script(Net(lambda layer, **_: layer)).eval())
    sites = wnconvert.find(frozen)
    assert len(sites) == 5
    assert all("constant" in (site.skip or "") or "attribute" in (site.skip or "") for site in sites)
    with pytest.raises(NothingToDo):
        wnconvert.convert_file(saved(frozen, tmp_path), tmp_path / "x.safetensors", "apply")


def test_a_pair_that_cannot_be_multiplied_names_file_and_tensor(tmp_path: Path) -> None:
    module = trained(Net(legacy))
    module.fc.weight_g.data[1] = torch.nan
    path = saved(torch.jit.trace(module, torch.randn(2, 2, 5), check_trace=False), tmp_path)
    with pytest.raises(PairError, match=r"model\.jit: fc\.weight: row 1 of g is NaN"):
        wnconvert.convert_file(path, command="fold")
    assert list(tmp_path.iterdir()) == [path]


def _without(path: Path, part: str) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist() if part not in name}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def _spoil_code(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, b"class (" if name.endswith(".py") else data)


def _flip_a_weight(path: Path) -> None:
    weight = torch.jit.load(path).fc.weight_v.detach().numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weight, weight[:-1] + b"\x00"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[:2000]),
        lambda path: _without(path, "/data/"),
        lambda path: _without(path, "data.pkl"),
        _spoil_code,
        _flip_a_weight,
        lambda path: path.write_bytes(path.read_bytes().replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_vX")),
        lambda path: path.write_bytes(path.read_bytes().replace(b"FloatStorage", b"FloatStorag\xff")),
    ],
    ids=["cut", "cut-short", "no-data", "no-pickle", "code", "flipped", "function", "storage"],
)
def test_damage_is_one_clear_line(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(traced(legacy), tmp_path)
    damage(path)
    assert main(["fold", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(path) in said
    assert list(tmp_path.iterdir()) == [path]


def test_a_compressed_archive_is_read(tmp_path: Path) -> None:
    module = traced(parametrized)
    path = saved(module, tmp_path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert_folded(module, folded(path))


def test_code_that_writes_files_is_neither_loaded_nor_run(tmp_path: Path) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = HandMade(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            torch.save(x, "/nonexistent/written.pt")
            return self.fc(x)

    path = saved(torch.jit.script(Writes()), tmp_path)
    report = wnconvert.convert_file(path, command="fold")
    assert report.outputs is not None
    assert "torch.save" in str(report.outputs.note)


def test_an_unknown_kind_of_pickle_runs_nothing(tmp_path: Path) -> None:
    path = saved(traced(legacy), tmp_path)
    data = path.read_bytes().replace(b"collections\nOrderedDict", b"os\nsystem\nOrderedDict")
    path.write_bytes(data)
    with pytest.raises(InputError):
        wnconvert.convert_file(path, command="fold")


def test_a_weight_changed_in_place_after_it_was_computed_is_left_alone(tmp_path: Path) -> None:
    class Doubled(Pair):
        def forward(self, x: Tensor) -> Tensor:
            w = torch._weight_norm(self.weight_v, self.weight_g, 0)
            w.mul_(2)
            return F.linear(F.linear(x, w), scale(self.more_v, self.more_g))

    class FirstRow(Pair):
        def forward(self, x: Tensor) -> Tensor:
            w = torch._weight_norm(self.weight_v, self.weight_g, 0)
            w[0] = 0
            return F.linear(F.linear(x, w), scale(self.more_v, self.more_g))

    class Column(Pair):
        def forward(self, x: Tensor) -> Tensor:
            w = torch._weight_norm(self.weight_v, self.weight_g, 0)
            w.t()[1:].copy_(torch.ones(3, 4))
            return F.linear(F.linear(x, w), scale(self.more_v, self.more_g))

    class Masked(Pair):
        def forward(self, x: Tensor) -> Tensor:
            w = torch._weight_norm(self.weight_v, self.weight_g, 0)
            w[torch.tensor([0, 2])] = 0.0
            return F.linear(F.linear(x, w), scale(self.more_v, self.more_g))

    class Data(Pair):
        def forward(self, x: Tensor) -> Tensor:
            w = torch._weight_norm(self.weight_v, self.weight_g, 0)
            w.data.mul_(2)
            return F.linear(F.linear(x, w), scale(self.more_v, self.more_g))

    class Chunk(Pair):
        def forward(self, x: Tensor) -> Tensor:
            w = torch._weight_norm(self.weight_v, self.weight_g, 0)
            with torch.no_grad():
                _, b = torch.chunk(w, 2)
                b.mul_(2)
            return F.linear(F.linear(x, w), scale(self.more_v, self.more_g))

    class Chosen(Pair):
        def forward(self, x: Tensor) -> Tensor:
            w = torch._weight_norm(self.weight_v, self.weight_g, 0)
            a = w if x.sum() > 0 else x
            a.mul_(2)
            return F.linear(F.linear(x, w), scale(self.more_v, self.more_g))

    class InADict(Pair):
        def forward(self, x: Tensor) -> Tensor:
            w = torch._weight_norm(self.weight_v, self.weight_g, 0)
            held = {"w": w}
            held["w"].mul_(2)
            return F.linear(F.linear(x, w), scale(self.more_v, self.more_g))

    class InAList(Pair):
        def forward(self, x: Tensor) -> Tensor:
            w = torch._weight_norm(self.weight_v, self.weight_g, 0)
            held = [x]
            held[0] = w
            held[0].mul_(2)
            return F.linear(F.linear(x, w), scale(self.more_v, self.more_g))

    for kind in (Doubled, FirstRow, Column, Masked, Data, Chunk, Chosen, InADict, InAList):
        torch.manual_seed(1)
        module, x = torch.jit.script(kind()), torch.randn(4, 4)
        report = wnconvert.convert_file(saved(module, tmp_path), command="fold", overwrite=True)
        reasons = {row.site.name: row.reason for row in report.rows}
        assert reasons["more"] is None, kind
        assert "changed in place, by " in str(reasons["weight"]), kind
        result = torch.jit.load(report.output)
        for _ in range(2):
            torch.testing.assert_close(result(x.clone()), module(x.clone()))


def test_a_traced_weight_changed_in_place_is_left_alone(tmp_path: Path) -> None:
    class Zeroed(Net):
        def forward(self, x: Tensor) -> Tensor:
            w = self.fc.weight
            w[0] = 0
            return F.linear(self.up(self.layers(x)), w)

    x = torch.randn(2, 2, 5)
    with torch.no_grad():
        module = torch.jit.trace(trained(Zeroed(parametrized)), x)
    report = wnconvert.convert_file(saved(module, tmp_path), command="fold")
    assert [row.site.name for row in report.rows if "in place" in str(row.reason)] == ["fc.weight"]
    torch.testing.assert_close(torch.jit.load(report.output)(x), module(x))


def test_a_counter_that_training_changes_is_no_weight() -> None:
    module = torch.jit.trace(nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)).train(), torch.randn(2, 2, 5))
    assert [site.name for site in wnconvert.find(module)] == ["0.weight"]


def test_both_branches_may_compute_a_weight_norm_beside_in_place_activations(tmp_path: Path) -> None:
    class Either(Pair):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                w = torch._weight_norm(self.weight_v, self.weight_g, 0)
            else:
                w = scale(self.weight_v, self.weight_g)
            return F.linear(F.linear(x, w).relu_(), scale(self.more_v, self.more_g))

    module, x = torch.jit.script(Either()), torch.randn(3, 4)
    result = folded(saved(module, tmp_path))
    assert set(result.state_dict()) == {"weight", "more"}
    for sign in (1, -1):
        torch.testing.assert_close(result(sign * x), module(sign * x))


def test_a_magnitude_that_is_an_output_too_does_not_stop_the_others(tmp_path: Path) -> None:
    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = HandMade(4, 4), HandMade(4, 4), parametrized(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.c(self.b(self.a(x))), self.a.weight_g, self.c.parametrizations.weight.original0

    module, x = torch.jit.trace(trained(Shows()), torch.randn(2, 4)), torch.randn(2, 4)
    report = wnconvert.convert_file(saved(module, tmp_path), command="fold")

    half = "c.parametrizations.weight.original0"
    assert {row.site.name: row.reason for row in report.rows} == {
        "a.weight": "the code also reads a.weight_g apart from the weight norm",
        "b.weight": None,
        "c.weight": f"the code also reads {half} apart from the weight norm",
    }
    torch.testing.assert_close(torch.jit.load(report.output)(x), module(x))


def test_bytecode_for_the_lite_interpreter_is_not_folded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = traced(legacy)
    path = tmp_path / "model.ptl"
    module._save_for_lite_interpreter(str(path))

    assert main(["inspect", str(path)]) == 0
    assert "bytecode" in capsys.readouterr().out
    assert main(["fold", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "fold what torch.jit.save writes" in said
    assert list(tmp_path.iterdir()) == [path]
    # The advice works.
    folded(saved(module, tmp_path))._save_for_lite_interpreter(str(path))
    from torch.jit.mobile import _load_for_lite_interpreter

    x = torch.randn(2, 2, 5)
    torch.testing.assert_close(_load_for_lite_interpreter(str(path))(x), module(x))


def _with_constants(path: Path, values: list[float], traces: bool) -> Path:
    """A network that adds constants; the order of the values is the one in which the code has them."""

    def add(x: Tensor) -> Tensor:
        for value in values:
            x = x + torch.tensor([value, 1.0])
        return x

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2))
    net.forward = lambda x: add(net[0](x))
    module = torch.jit.trace(net, torch.randn(1, 2))
    torch.jit.save(module, path)
    if not traces:
        _without(path, "traced_inputs.pkl")
    return path


@pytest.mark.parametrize("traces", [True, False])
def test_verify_takes_constants_in_any_order(traces: bool, tmp_path: Path) -> None:
    one = _with_constants(tmp_path / "a.jit", [1, 2], traces)
    two = _with_constants(tmp_path / "b.jit", [2, 1], traces)
    other = _with_constants(tmp_path / "c.jit", [1, 3], traces)

    same, different = wnconvert.verify(one, two), wnconvert.verify(one, other)
    assert same.same
    assert different.outputs is not None
    if traces:
        assert same.outputs is not None
        assert same.outputs.equal
        assert not different.same
    else:
        assert different.outputs.equal is None
        assert "constants of the code differ" in str(different.outputs.note)
