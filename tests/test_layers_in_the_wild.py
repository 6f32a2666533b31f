"""Modules as people write them: shared, tied, constrained, wrapped, with names and classes of their own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import wnconvert
from tests import reference
from tests.networks import Tied
from tests.test_traps import legacy
from wnconvert.errors import InputError, PairError, UsageError
from wnconvert.walk import fx


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class MaxNorm(nn.Conv2d):
    """EEGNet's convolution: it writes to its own weight in every forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(input)


class ByCall(nn.Module):
    """A layer that pickles as a call of its class."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.weight = nn.Parameter(torch.randn(n, n))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.n,), self.__dict__


def test_a_module_under_two_names_is_converted_once() -> None:
    module, x = Shared(), torch.randn(2, 3)
    expected, before = module(x), copy.deepcopy(module.state_dict())
    report = wnconvert.apply(module).report
    assert [(row.site.name, row.site.tied, row.action) for row in report.rows] == [("a.weight", ("b.weight",), "split")]
    assert torch.equal(module(x), expected)
    split = copy.deepcopy(module.state_dict())
    wnconvert.fold(module)
    assert module.a is module.b
    assert all(reference.same_bits(module.state_dict()[k], before[k]) for k in before)
    assert torch.equal(wnconvert.load_into(Shared(), split)(x), expected)


# --- writing to weights, the other half ----------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["weight_g", "weight_v"])
def test_training_through_data_after_a_read_is_not_undone(half: str) -> None:
    module = wnconvert.apply(nn.Linear(4, 3)).model
    expected = -2 * module.weight.detach() if half == "weight_g" else -module.weight.detach()
    getattr(module, half).data.mul_(-2)
    for _ in range(2):
        assert torch.allclose(module.weight, expected, atol=1e-6)


def test_averaging_by_data_with_a_logged_norm() -> None:
    module = wnconvert.apply(nn.Linear(4, 3)).model
    average = copy.deepcopy(module)
    with torch.no_grad():
        module.weight_g.mul_(2)
    for _ in range(20):
        average.weight.norm()
        for ours, theirs in zip(average.parameters(), module.parameters(), strict=True):
            ours.data.lerp_(theirs.data, 0.5)
    assert torch.allclose(average.weight, module.weight, rtol=1e-4)


def test_an_initialised_weight_reaches_whoever_asks_for_the_parameters() -> None:
    # DistributedDataParallel broadcasts what named_parameters gives.
    module = wnconvert.apply(nn.Linear(4, 3)).model
    nn.init.ones_(module.weight)
    assert dict(module.named_parameters())["weight_g"].flatten().tolist() == [2, 2, 2]


def test_an_initialised_weight_survives_a_touch_of_the_parameters() -> None:
    module = wnconvert.apply(nn.Linear(4, 3)).model
    nn.init.ones_(module.weight)
    with torch.no_grad():
        module.weight_v.add_(0)
    assert torch.equal(module.weight, torch.ones(3, 4))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_an_initialised_weight_reaches_the_compiler(fullgraph: bool) -> None:
    module = wnconvert.apply(nn.Linear(4, 3, bias=False)).model
    nn.init.ones_(module.weight)
    compiled = torch.compile(module, fullgraph=fullgraph, backend="eager")
    assert torch.equal(compiled(torch.ones(1, 4)), torch.full((1, 3), 4.0))


def test_a_permuted_weight_is_noticed() -> None:
    module = wnconvert.apply(nn.Linear(4, 3)).model
    flipped = module.weight.detach().flip(0, 1)
    module.weight.data.copy_(flipped)
    assert torch.equal(module.weight, flipped)


def test_a_diverged_weight_can_be_looked_at_and_saved() -> None:
    module = wnconvert.apply(nn.Linear(4, 3)).model
    with torch.no_grad():
        module.weight_g.fill_(float("nan"))
    for _ in range(3):
        assert bool(module.weight.isnan().all())
    assert bool(module.state_dict()["weight_g"].isnan().all())


def test_writing_what_cannot_be_split_names_the_weight() -> None:
    module = wnconvert.apply(nn.Linear(4, 3)).model
    with pytest.raises(ValueError, match="cannot split what was written to 'weight': row 0 holds NaN"):
        module.weight = torch.full((3, 4), float("nan"))


def test_a_layer_that_constrains_its_own_weight_still_does() -> None:
    torch.manual_seed(0)
    module, x = MaxNorm(3, 4, 3), torch.randn(1, 3, 6, 6)
    twin = copy.deepcopy(module)
    wnconvert.apply(module)
    for _ in range(3):
        assert torch.allclose(module(x), twin(x), atol=1e-5)
    assert float(reference.norm(module.weight.detach(), (0,)).max()) <= 0.5 + 1e-6


# --- names, classes, wrappers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("put", [
    lambda m: setattr(m, "weight_v", nn.Parameter(torch.ones(1))),
    lambda m: setattr(m, "weight_g", 5.0),
    lambda m: m.register_buffer("weight_g", torch.ones(1)),
], ids=["parameter", "attribute", "buffer"])  # fmt: skip
def test_a_layer_with_a_weight_g_of_its_own_is_left_alone(put: Callable[[nn.Module], None]) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    put(module[0])
    before = dict(module.state_dict())
    (row,) = wnconvert.apply(module).report.rows
    assert row.action == "skipped"
    assert "of its own" in str(row.reason)
    assert type(module[0]) is nn.Linear
    assert list(module.state_dict()) == list(before)


def test_a_class_that_reduces_itself_to_a_call_keeps_its_pair() -> None:
    module = wnconvert.apply(nn.Sequential(ByCall(3))).model
    with torch.no_grad():
        module[0].weight_g.mul_(2)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin[0].weight, module[0].weight)
        wnconvert.fold(twin)
        assert type(twin[0]) is ByCall
    assert hasattr(module[0], "weight_g")


def test_the_layers_of_a_traced_graph_are_split() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    x = torch.randn(2, 4)
    expected = graph(x)
    wnconvert.apply(graph)
    for twin in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert reference.same_bits(twin(x), expected)


def test_our_class_over_a_parametrized_one() -> None:
    gru = parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    expected = gru(x)[0]
    wnconvert.apply(gru)
    assert torch.allclose(gru(x)[0], expected, atol=1e-6)
    wnconvert.fold(gru, include="*hh*")
    assert torch.allclose(gru(x)[0], expected, atol=1e-6)
    assert isinstance(gru, nn.GRU)
    wnconvert.fold(gru)
    assert type(gru) is nn.GRU
    assert torch.allclose(gru(x)[0], expected, atol=1e-6)


def test_a_foreign_class_over_ours_is_reported_and_left_alone() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    module = wnconvert.apply(nn.Linear(3, 3)).model
    parametrize.register_parametrization(module, "bias", Double())
    for report in (wnconvert.fold(module).report, wnconvert.apply(module).report):
        (row,) = [row for row in report.rows if row.site.name == "weight"]
        assert (row.action, "has become a Parametrized" in str(row.reason)) == ("skipped", True)
    parametrize.remove_parametrizations(module, "bias")
    wnconvert.fold(module)
    assert type(module) is nn.Linear


def test_a_tied_weight_with_a_legacy_hook_on_one_side() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    legacy(module[1])
    expected = module(torch.eye(3))
    wnconvert.apply(module)
    wnconvert.fold(module)
    assert torch.allclose(module(torch.eye(3)), expected, atol=1e-6)


def test_forward_mode_derivatives() -> None:
    module = wnconvert.apply(nn.Linear(4, 3).double()).model
    state = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tangents = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    x = torch.randn(2, 4, dtype=torch.float64)

    def call(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, values, (x,))

    _, derivative = torch.func.jvp(call, (state,), (tangents,))
    step = 1e-6
    moved = call({name: tensor + step for name, tensor in state.items()})
    assert torch.allclose((moved - call(state)) / step, derivative, rtol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        duals = {name: torch.autograd.forward_ad.make_dual(state[name], tangents[name]) for name in state}
        found = torch.autograd.forward_ad.unpack_dual(call(duals)).tangent
    assert torch.allclose(found, derivative)


# --- walking ---------------------------------------------------------------------------------------------------------


def test_walking_changes_neither_buffers_nor_lists_nor_the_random_state() -> None:
    class Busy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("mean", torch.zeros(2))
            self.seen: list[object] = []
            self.cache: dict[str, object] = {}

        def forward(self, x: Tensor) -> Tensor:
            self.mean.add_(1)
            self.seen.append(x)
            self.cache["x"] = x
            return self.layer(x) + torch.rand(2)

    module, state = Busy(), torch.random.get_rng_state()
    assert fx.trace(module).called == {"layer"}
    assert wnconvert.find(module)[0].name == "layer.weight"
    assert (module.mean.tolist(), module.seen, module.cache) == ([0, 0], [], {})
    assert torch.equal(torch.random.get_rng_state(), state)
    pickle.dumps(module.cache)


def test_layers_inside_a_leaf_of_the_trace_count_as_reached() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x)

    assert all("not in the trace" not in use for site in wnconvert.find(Model()) for use in site.uses)


def test_every_matrix_is_listed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 4, 5))
            self.norm = nn.LayerNorm((4, 5))
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x * self.experts.sum(0)))

    module = Model()
    report = wnconvert.apply(module).report
    listed = {row.site.name for row in report.rows}
    assert listed == {name for name, p in Model().named_parameters() if p.dim() > 1}
    assert {row.site.name for row in report.rows if row.action == "split"} == {"layer.weight"}


# --- errors ----------------------------------------------------------------------------------------------------------


def test_fold_checks_everything_before_it_changes_anything() -> None:
    module = wnconvert.apply(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))).model
    with torch.no_grad():
        module[1].weight_v[1, 1] = float("nan")
    with pytest.raises(PairError, match=r"1\.weight: row 1 of v holds NaN"):
        wnconvert.fold(module)
    assert hasattr(module[0], "weight_g")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: wnconvert.find("model.pt"), "or a state dict, not str; convert_file"),
        (lambda m: wnconvert.apply(None), "not NoneType"),
        (lambda m: wnconvert.apply(m, dim="none"), "dim is 'torch', 'out', None or an axis, not 'none'"),
        (lambda m: wnconvert.apply(m, dim=True), "not True"),
        (lambda m: wnconvert.apply(m, include=[3]), "take shell globs"),
        (lambda m: wnconvert.apply(torch.jit.script(m)), "a TorchScript module cannot carry g and v"),
        (lambda m: wnconvert.apply(m, include="typo*"), "--include 'typo\\*' matches no weight"),
    ],
)
def test_senseless_requests_are_one_clear_line(call: Callable[[nn.Module], object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        call(nn.Sequential(nn.Linear(2, 2)))
    assert "\n" not in str(error.value)


def test_folding_what_is_plain_is_no_error_whatever_the_pattern() -> None:
    assert wnconvert.fold(nn.Linear(2, 2), include="weight").report.rows == []


def test_a_split_module_on_the_meta_device_is_reported() -> None:
    module = wnconvert.apply(nn.Linear(2, 2)).model.to("meta")
    (row,) = wnconvert.fold(module).report.rows
    assert row.reason == "has no data (meta device)"


def test_a_layer_without_inputs_is_left_alone() -> None:
    (row,) = wnconvert.apply(nn.Linear(0, 3)).report.rows
    assert row.reason == "it is empty"


# --- load_into -------------------------------------------------------------------------------------------------------


def test_load_into_keeps_ties() -> None:
    source = wnconvert.apply(Tied()).model
    module = wnconvert.load_into(Tied(), source.state_dict())
    assert module.embedding.weight_g is module.head.weight_g
    assert module.embedding.weight_v is module.head.weight_v
    assert len(list(module.parameters())) == len(list(source.parameters()))


@pytest.mark.parametrize("split", [True, False])
def test_load_into_takes_a_file_that_leaves_tied_names_out(split: bool) -> None:
    source = wnconvert.apply(Tied()).model if split else Tied()
    state = {key: tensor for key, tensor in source.state_dict().items() if not key.startswith("head.")}
    module = wnconvert.load_into(Tied(), state)
    tokens = torch.tensor([[1, 2]])
    assert torch.equal(module(tokens), source(tokens))


def test_load_into_fills_a_module_without_data() -> None:
    source = wnconvert.apply(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))).model
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    wnconvert.load_into(module, source.state_dict())
    x = torch.randn(1, 3)
    assert torch.equal(module(x), source(x))


def test_load_into_leaves_buffers_that_look_like_a_pair_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w_g", torch.ones(2, 1))
            self.register_buffer("w_v", torch.ones(2, 3))
            self.layer = nn.Linear(2, 2)

        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"version": 1}

    source = wnconvert.apply(Model()).model
    module = wnconvert.load_into(Model(), source.state_dict())
    assert torch.equal(module.layer.weight_g, source.layer.weight_g)
    assert type(module) is Model


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_load_into_reads_files(suffix: str, tmp_path: object) -> None:
    from safetensors.torch import save_file

    source = wnconvert.apply(nn.Sequential(nn.Linear(3, 4))).model
    path = f"{tmp_path}/model{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "net": source.state_dict()}, path)
    else:
        save_file(source.state_dict(), path)
    module = wnconvert.load_into(nn.Sequential(nn.Linear(3, 4)), path)
    assert torch.equal(module[0].weight_g, source[0].weight_g)


def test_load_into_refuses_what_is_no_checkpoint(tmp_path: object) -> None:
    with pytest.raises(InputError, match="no such file"):
        wnconvert.load_into(nn.Linear(2, 2), f"{tmp_path}/nothing.pt")
    with pytest.raises(UsageError, match="needs a state dict or the path of a file, not NoneType"):
        wnconvert.load_into(nn.Linear(2, 2), None)  # type: ignore[arg-type]


def test_a_module_saved_whole_and_written_to_since(tmp_path: object) -> None:
    module = wnconvert.apply(nn.Linear(2, 2)).model
    nn.init.ones_(module.weight)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).weight, torch.ones(2, 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_product_with_the_weight_rounds_as_before_without_gradients(mode: type) -> None:
    # torch.matmul takes another path for operands that require gradients, even where none are taken.
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 96)
            self.w = nn.Parameter(torch.randn(96, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer.weight @ x.mT + self.w @ x.mT

    module, x = Product(), torch.randn(1, 8, 3)
    with mode():
        before = module(x)
    wnconvert.apply(module)
    with mode():
        assert torch.equal(module(x), before)
