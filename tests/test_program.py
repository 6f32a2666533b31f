"""Exported programs in memory, checked against the modules they came from and torch's own weight norm."""

import copy
import io
import warnings

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export
from torch.nn.utils import parametrizations

import wnconvert
from wnconvert import weightnorm
from wnconvert.compare import ulp_distance

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Dynamic shapes, a tie, a buffer that training writes to, a constant, a branch, and a part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.conv, self.up = nn.Conv1d(6, 6, 3, padding=1), nn.ConvTranspose1d(6, 6, 3, padding=1, groups=2)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.rand(6), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.up(self.conv(self.table(x).transpose(1, 2)))).transpose(1, 2)
        y = y * self.scale + torch.tensor([1.0, 2, 3, 4, 5, 6])
        with torch.no_grad():
            z = self.head(y.contiguous())
        return z + torch.cond(y.sum() > 0, lambda y: self.head(y).sin(), lambda y: -self.head(y), (y,))


TOKENS = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 0, 1, 2]])


def exported(net: nn.Module, decomposed: bool = False, x: torch.Tensor = TOKENS) -> torch.export.ExportedProgram:
    shapes = ({0: Dim("batch"), 1: Dim("time", min=2)},) if x is TOKENS else None
    program = export(net, (x,), dynamic_shapes=shapes)
    return program.run_decompositions() if decomposed else program


def run(program: torch.export.ExportedProgram, x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(program.module())(x)


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize(
    ("decomposed", "dim", "names"),
    [(False, "torch", "parametrized"), (True, "torch", "legacy"), (False, "out", "legacy"), (True, None, "legacy")],
)
def test_apply_keeps_every_bit_and_the_input_and_comes_back(decomposed: bool, dim, names) -> None:
    torch.manual_seed(0)
    program = exported(Net(), decomposed)
    before, tensors, x = (
        str(program),
        {k: v.clone() for k, v in program.state_dict.items()},
        torch.randint(0, 7, (3, 4)),
    )

    result = wnconvert.apply(program, dim=dim, names=names)
    again = wnconvert.fold(saved_and_loaded(result.model))

    assert {row.site.name for row in result.report.rows if row.action == "split"} >= {"conv.weight", "up.weight"}
    assert torch.equal(run(result.model, x), run(program, x))
    assert torch.equal(run(again.model, x), run(program, x))
    assert str(program) == before and all(torch.equal(tensors[k], v) for k, v in program.state_dict.items())
    assert list(wnconvert.fold(result.model).model.state_dict) == list(tensors)
    assert set(again.model.state_dict) == set(tensors)
    assert all(torch.equal(tensors[k], v) for k, v in again.model.state_dict.items())
    assert again.model.graph_signature.input_specs == program.graph_signature.input_specs
    assert result.model.verifiers == program.verifiers and result.model.range_constraints == program.range_constraints


def test_a_program_applied_and_folded_is_the_same_program() -> None:
    program = exported(Net().eval())

    again = wnconvert.fold(wnconvert.apply(program).model).model

    assert str(again) == str(program)


def test_tied_weights_are_split_once_wherever_they_are_used() -> None:
    result = wnconvert.apply(exported(Net()))

    (site,) = [row.site for row in result.report.rows if row.site.name == "table.weight"]
    state = result.model.state_dict
    assert site.tied == ("head.weight",) and len(site.uses) == 3  # without gradients, and in both branches
    assert state["table.weight_g"] is state["head.weight_g"] and state["table.weight_v"] is state["head.weight_v"]
    assert sum(name.endswith("_v") for name, _ in result.model.named_parameters()) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_formula_has_the_bits_and_gradients_of_the_split_module(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(33, 20), nn.Tanh(), nn.Linear(20, 5)).to(dtype), torch.randn(9, 33, dtype=dtype)
    plain = exported(net, x=x)
    programs = [wnconvert.apply(plain).model, wnconvert.apply(plain.run_decompositions()).model]
    programs.append(programs[0].run_decompositions())
    split = wnconvert.apply(copy.deepcopy(net)).model
    split(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in split.named_parameters()}

    for program in programs:
        module = copy.deepcopy(program.module())
        assert torch.equal(module(x), net(x))
        module(x).square().sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad.abs().max() > 0
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2
            )


def _legacy(module: nn.Module, dim) -> nn.Module:
    return torch.nn.utils.weight_norm(module, dim=dim)


def _parametrized(module: nn.Module, dim) -> nn.Module:
    return parametrizations.weight_norm(module, dim=dim)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("norm", [_legacy, _parametrized])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_the_weight_norm_of_torch_is_folded_in_every_form(norm, dim, decomposed: bool) -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(norm(nn.Conv1d(4, 6, 3), dim), nn.Tanh(), norm(nn.Conv1d(6, 3, 2), dim)),
        torch.randn(2, 4, 9),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.3)
    program = exported(net, decomposed, x)
    before = net(x)

    folded = wnconvert.fold(program).model

    names = {spec.target for spec in folded.graph_signature.input_specs if spec.target}
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"} == set(folded.state_dict)
    assert not any("norm" in node.name or node.target is torch.ops.aten.div.Tensor for node in folded.graph.nodes)
    assert ulp_distance(folded.state_dict["0.weight"], net[0].weight) <= 2
    torch.testing.assert_close(run(saved_and_loaded(folded), x), before, rtol=1e-5, atol=1e-5)


def test_one_pair_computed_twice_is_folded_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = _parametrized(nn.Linear(4, 4), 0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.a(x).tanh())

    net, x = Twice(), torch.randn(2, 4)
    folded = wnconvert.fold(exported(net, x=x)).model

    assert [node.name for node in folded.graph.nodes if node.op == "placeholder"] == ["p_a_bias", "p_a_weight", "x"]
    torch.testing.assert_close(run(folded, x), net(x))


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_trained_program_runs_in_onnxruntime(tmp_path, decomposed: bool) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv1d(4, 5, 3), nn.Tanh(), nn.ConvTranspose1d(5, 4, 3)).eval(), torch.randn(2, 4, 8)
    program = wnconvert.apply(exported(net, decomposed, x), dim="out").model
    program = saved_and_loaded(program)
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    expected = run(program, x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(program, dynamo=True, verbose=False).save(str(tmp_path / "m.onnx"))
    (y,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"input": x.numpy()})

    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-5, atol=1e-5)
    folded = wnconvert.fold(program).model
    torch.testing.assert_close(run(folded, x), expected, rtol=1e-5, atol=1e-5)
    pair = program.state_dict["0.weight_g"], program.state_dict["0.weight_v"]
    assert torch.equal(folded.state_dict["0.weight"], weightnorm.fold(*pair))
    torch.testing.assert_close(folded.state_dict["0.weight"].detach(), torch._weight_norm(pair[1], pair[0], 0).detach())


def test_a_split_program_unflattens_with_the_names_of_the_module() -> None:
    x = torch.randn(2, 3)
    program = wnconvert.apply(exported(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), x=x)).model
    expected = program.module()(x)

    module = torch.export.unflatten(program)

    assert torch.equal(module(x), expected)
    assert "0.weight_g" in dict(module.named_parameters())


class Odd(nn.Module):
    """Weights that must be left alone, each for its own reason."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.used, self.fixed = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
        self.register_buffer("mel", torch.randn(4, 4))
        self.taken = nn.Parameter(torch.randn(4, 4))
        self.taken_g = nn.Parameter(torch.randn(3))
        self.whole = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.written.mul_(0.5)
        x = F.linear(F.linear(x, self.written), self.mel) + self.used
        return F.linear(x, self.taken) * self.taken_g.sum() + F.linear(x, self.fixed)


@pytest.mark.parametrize("decomposed", [False, True])
def test_weights_that_cannot_be_replaced_are_skipped_with_the_reason(decomposed: bool) -> None:
    x = torch.randn(4, 4)
    result = wnconvert.apply(exported(Odd(), decomposed, x))

    rows = {row.site.name: (row.action, row.reason or "") for row in result.report.rows}
    assert rows["fixed"] == ("split", "")
    assert rows["mel"] == ("skipped", "a buffer, which does not train")
    assert "used by add" in rows["used"][1]
    assert "taken_g is there already" in rows["taken"][1]
    assert rows["written"][1] in ("the program writes to it", "the program returns its new value or its gradient")
    assert rows["whole"][0] == "skipped"


def test_a_magnitude_used_by_itself_is_not_folded_away() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = _legacy(nn.Linear(4, 4), 0)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.a.weight_g.abs().sum()

    result = wnconvert.fold(exported(Penalised(), x=torch.randn(2, 4)))

    assert [row.reason for row in result.report.rows] == ["the program uses its magnitude or direction by itself"]


def test_preserved_module_signatures_survive() -> None:
    net, x = nn.Sequential(_legacy(nn.Linear(4, 4), 0), nn.Linear(4, 4)), torch.randn(2, 4)
    program = export(net, (x,), preserve_module_call_signature=("0", "1"))

    split = wnconvert.apply(wnconvert.fold(program).model).model

    assert [entry.fqn for entry in split.module_call_graph if entry.signature] == ["", "0", "1"]
    torch.testing.assert_close(torch.export.unflatten(split)(x), net(x))


def test_verify_and_find_take_programs() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    program = exported(net, x=x)
    split = wnconvert.apply(program, include="0.*").model

    assert wnconvert.verify(program, split).weights.identical
    assert wnconvert.verify(net, split).weights.identical
    assert [(site.name, site.state, site.scheme) for site in wnconvert.find(split)] == [("0.weight", "split", "legacy")]
    with torch.no_grad():
        split.state_dict["0.weight_g"][0] += 1
    assert not wnconvert.verify(program, split).weights.identical


class Shows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.linear(x, self.weight), self.weight


def test_a_weight_that_is_an_output_too_stays_one() -> None:
    net, x = nn.Sequential(Shows()), torch.randn(2, 4)
    program = export(net, (x,), preserve_module_call_signature=("0",))

    split = wnconvert.apply(program).model
    folded = wnconvert.fold(split).model

    for changed in (split, folded):
        assert all(torch.equal(a, b) for a, b in zip(saved_and_loaded(changed).module()(x), net(x)))
    assert all(torch.equal(a, b) for a, b in zip(torch.export.unflatten(folded)(x), net(x)))
    assert [spec.arg.name for spec in folded.graph_signature.output_specs] == [
        spec.arg.name for spec in program.graph_signature.output_specs
    ]


class Changes(nn.Module):
    """Weights that the code changes after it has computed them, and one that it does not."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (_parametrized(nn.Linear(4, 4, dtype=dtype), 0) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, d = self.a.weight, self.b.weight, self.d.weight.float().to(self.d.bias.dtype)
        a.mul_(2)
        b.t()[0].zero_()
        d.mul_(3)
        return F.linear(self.c(F.linear(F.linear(x, a), b)), d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_changed_in_place_after_it_was_computed_is_left_alone(dtype: torch.dtype) -> None:
    net, x = Changes(dtype), torch.randn(2, 4, dtype=dtype)
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    with torch.no_grad():
        program = exported(net, x=x)
        result = wnconvert.fold(program)

        reasons = {row.site.name: row.reason or "" for row in result.report.rows}
        assert reasons.pop("c.weight") == ""
        assert set(reasons) == {"a.weight", "b.weight", "d.weight"}
        assert all("changed in place" in reason for reason in reasons.values()), reasons
        module = copy.deepcopy(result.model.module())
        for _ in range(2):
            torch.testing.assert_close(module(x), net(x), **tolerance)
