"""Every trap of weight normalization that people have fallen into, as a test."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import wnconvert
from tests import reference
from tests.networks import Functional, Tied
from wnconvert.errors import InputError, UsageError


def legacy(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name, dim)  # type: ignore[no-any-return]


def parametrized(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    return parametrizations.weight_norm(module, name, dim)


FORMS: dict[str, Callable[..., nn.Module]] = {
    "wnconvert": lambda module, name="weight", dim=0: wnconvert.apply(module, include=f"*{name}", dim=dim).model,
    "legacy": legacy,
    "parametrized": parametrized,
}
forms = pytest.mark.parametrize("form", FORMS)
torch_forms = pytest.mark.parametrize("form", ["legacy", "parametrized"])


def trained(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.25)
    return module


# --- fold of every form -------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("layer", [nn.Conv1d(4, 6, 3), nn.ConvTranspose1d(4, 6, 3)], ids=["Conv1d", "ConvTranspose1d"])
def test_fold_multiplies_every_form_back(form: str, dim: int | None, layer: nn.Module) -> None:
    module = trained(FORMS[form](copy.deepcopy(layer), dim=dim))
    state = module.state_dict()
    g, v = (t for key, t in state.items() if key.endswith(("_g", "_v", "original0", "original1")))
    expected = reference.fold(g, v, None if dim is None else (dim,))
    result = wnconvert.fold(module)
    assert [row.action for row in result.report.rows] == ["folded"]
    assert type(module) is type(layer)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert reference.same_bits(module.weight, expected)
    assert isinstance(module.weight, nn.Parameter)
    assert [row.action for row in wnconvert.fold(module).report.rows] == []


@forms
def test_a_folded_module_pickles_and_deep_copies_and_loads(form: str) -> None:
    module = wnconvert.fold(FORMS[form](nn.Linear(4, 3))).model
    assert not module._load_state_dict_pre_hooks
    assert not module._forward_pre_hooks
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin.weight, module.weight)
    module.load_state_dict(nn.Linear(4, 3).state_dict(), strict=True)


def test_fold_removes_the_hook_that_torch_itself_leaves_behind() -> None:
    module = parametrized(nn.Linear(4, 3))
    parametrize.remove_parametrizations(module, "weight")
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(module)
    wnconvert.fold(module)
    pickle.dumps(module)


@forms
def test_fifty_cycles_leave_nothing_behind(form: str) -> None:
    module = nn.Linear(4, 3)
    before, weight = set(vars(module)), module.weight.detach().clone()
    for _ in range(50):
        wnconvert.fold(FORMS[form](module))
    assert set(vars(module)) == before
    assert not module._load_state_dict_pre_hooks
    if form == "wnconvert":
        assert reference.same_bits(module.weight, weight)


@pytest.mark.parametrize("form", ["wnconvert", "parametrized"])
def test_folding_a_deep_copy_leaves_the_original_whole(form: str) -> None:
    module = nn.Sequential(FORMS[form](nn.Linear(4, 3)))
    x = torch.randn(2, 4)
    expected = module(x)
    twin = wnconvert.fold(copy.deepcopy(module)).model
    assert torch.equal(module(x), expected)
    assert torch.allclose(twin(x), expected)
    assert len(list(module.parameters())) == 3


def test_folding_one_of_two_parametrizations_leaves_the_other() -> None:
    lstm = parametrized(parametrized(nn.LSTM(3, 4), "weight_ih_l0"), "weight_hh_l0")
    twin = copy.deepcopy(lstm)
    wnconvert.fold(lstm, include="weight_ih_l0")
    assert [name for name, _ in lstm.named_parameters() if name.startswith("weight")] == ["weight_ih_l0"]
    assert parametrize.is_parametrized(lstm, "weight_hh_l0")
    assert not parametrize.is_parametrized(lstm, "weight_ih_l0")
    assert parametrize.is_parametrized(twin, "weight_ih_l0")
    wnconvert.fold(lstm)
    assert type(lstm) is nn.LSTM
    assert list(lstm.state_dict()) == list(nn.LSTM(3, 4).state_dict())
    x = torch.randn(5, 2, 3)
    assert torch.allclose(lstm(x)[0], twin(x)[0], atol=1e-6)


def test_legacy_weights_are_stale_after_loading_but_fold_is_not() -> None:
    module = legacy(nn.Linear(4, 3))
    module.load_state_dict({k: 2 * v for k, v in module.state_dict().items()})
    expected = reference.fold(module.weight_g.detach(), module.weight_v.detach(), (0,))
    wnconvert.fold(module)
    assert reference.same_bits(module.weight, expected)


def test_spectral_and_orthogonal_parametrizations_are_left_alone_and_reported() -> None:
    module = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 4)),
        parametrizations.orthogonal(nn.Linear(4, 4)),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4),
    )
    report = wnconvert.apply(module).report
    actions = {row.site.name: (row.action, row.reason) for row in report.rows}
    assert actions["3.weight"] == ("split", None)
    assert "SpectralNorm" in str(actions["0.weight"][1])
    assert "Orthogonal" in str(actions["1.weight"][1])
    assert "spectral norm" in str(actions["2.weight"][1])
    folded = {row.site.name: row.action for row in wnconvert.fold(module).report.rows}
    assert folded == {"0.weight": "skipped", "1.weight": "skipped", "2.weight": "skipped", "3.weight": "folded"}
    assert parametrize.is_parametrized(module[0], "weight")


def test_weight_norm_under_another_parametrization_is_not_folded() -> None:
    module = parametrized(nn.Linear(4, 4))
    parametrizations.spectral_norm(module)
    report = wnconvert.fold(module).report
    assert [(row.action, row.reason) for row in report.rows] == [
        ("skipped", "other parametrizations are stacked on it")
    ]
    assert parametrize.is_parametrized(module, "weight")


# --- applying twice, ties, frozen weights, optimizers -----------------------------------------------------------


@forms
def test_applying_twice_changes_nothing_and_says_so(form: str) -> None:
    module = FORMS[form](nn.Linear(4, 3))
    names = list(module.state_dict())
    report = wnconvert.apply(module).report
    assert [row.action for row in report.rows] == ["skipped"]
    assert "already split" in str(report.rows[0].reason)
    assert list(module.state_dict()) == names


def test_a_tied_weight_stays_one_weight() -> None:
    module = Tied()
    report = wnconvert.apply(module).report
    row = report.rows[0]
    assert (row.site.name, row.site.tied, row.site.kind) == ("embedding.weight", ("head.weight",), "Linear")
    assert module.embedding.weight_g is module.head.weight_g
    assert module.embedding.weight_v is module.head.weight_v
    parameters = list(module.parameters())
    assert len(parameters) == len({id(p) for p in parameters}) == 5
    module(torch.tensor([[1, 2]])).sum().backward()
    torch.optim.SGD(parameters, 0.1).step()
    assert torch.equal(module.embedding.weight, module.head.weight)
    wnconvert.fold(module)
    assert module.embedding.weight is module.head.weight
    assert type(module.embedding) is nn.Embedding


def test_parameters_on_one_storage_become_one_pair() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = nn.Parameter(module[0].weight.detach())
    wnconvert.apply(module)
    assert module[0].weight_g is module[1].weight_g


def test_a_frozen_weight_stays_frozen() -> None:
    module = nn.Linear(4, 3)
    module.weight.requires_grad_(False)
    wnconvert.apply(module)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["bias"]
    wnconvert.fold(module)
    assert not module.weight.requires_grad


def test_an_embedding_alone_is_listed_and_split_only_on_request() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    row = wnconvert.apply(module).report.rows[0]
    assert (row.action, "--kind Embedding" in str(row.reason)) == ("skipped", True)
    assert type(module[0]) is nn.Embedding
    wnconvert.apply(module, kinds="Embedding")
    assert torch.equal(module(torch.tensor([1])), module[1](F.embedding(torch.tensor([1]), module[0].weight)))


# --- writing to the weight ----------------------------------------------------------------------------------------


WRITES: dict[str, Callable[[nn.Linear, torch.Tensor], object]] = {
    "assign a parameter": lambda m, w: setattr(m, "weight", nn.Parameter(w)),
    "assign a tensor": lambda m, w: setattr(m, "weight", w),
    "nn.init": lambda m, w: _init(m.weight, w),
    "data": lambda m, w: m.weight.data.copy_(w),
    "assign data": lambda m, w: setattr(m.weight, "data", w),
    "no_grad copy": lambda m, w: _copy(m.weight, w),
}


def _init(weight: torch.Tensor, value: torch.Tensor) -> None:
    nn.init.zeros_(weight)
    with torch.no_grad():
        weight.add_(value)


def _copy(weight: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(value)


READS: dict[str, Callable[[nn.Linear], torch.Tensor]] = {
    "read": lambda m: m.weight,
    "forward": lambda m: m(torch.eye(4)).t() - m.bias[:, None],
    "state dict": lambda m: _folded(m.state_dict()),
    "fold": lambda m: wnconvert.fold(m).model.weight,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).weight,
    "deep copy": lambda m: copy.deepcopy(m).weight,
    "cast": lambda m: m.double().weight.float(),
}


def _folded(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return reference.fold(state["weight_g"], state["weight_v"], (0,))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("read", READS)
def test_what_is_written_to_the_weight_is_not_lost(write: str, read: str) -> None:
    module = wnconvert.apply(nn.Linear(4, 3)).model
    pair = module.weight_g, module.weight_v
    value = torch.randn(3, 4)
    WRITES[write](module, value)
    assert torch.allclose(READS[read](module), value, atol=1e-6)
    if read not in ("fold", "cast"):
        assert (module.weight_g, module.weight_v) == pair, "an optimizer holds these parameters"


def test_initialising_by_module_apply_takes_effect() -> None:
    # The way vocoders do it: generator.apply(init_weights) with m.weight.data.normal_(0, 0.01).
    module = wnconvert.apply(nn.Sequential(nn.Conv1d(4, 64, 3), nn.Conv1d(64, 64, 3))).model
    module.apply(lambda m: m.weight.data.normal_(0.0, 0.01) if isinstance(m, nn.Conv1d) else None)
    assert [round(float(layer.weight.detach().std()), 2) for layer in module] == [0.01, 0.01]


def test_a_weight_read_before_training_does_not_undo_it() -> None:
    module = wnconvert.apply(nn.Linear(4, 3)).model
    held = module.weight  # still alive below
    with torch.no_grad():
        module.weight_g.mul_(3)
    assert torch.allclose(module.weight, 3 * held)
    held = module.weight
    module.load_state_dict(nn.Linear(4, 3).state_dict())
    assert not torch.allclose(module.weight, held)


def test_wrong_values_are_refused() -> None:
    module = wnconvert.apply(nn.Linear(4, 3)).model
    with pytest.raises(ValueError, match=r"shape \[4, 4\] as 'weight' of shape \[3, 4\]"):
        module.weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(TypeError, match="cannot assign NoneType as 'weight'"):
        module.weight = None


# --- special layers -----------------------------------------------------------------------------------------------


def test_a_changed_magnitude_reaches_the_recurrent_kernel_at_once() -> None:
    lstm = wnconvert.apply(nn.LSTM(3, 4)).model
    x = torch.randn(5, 2, 3)
    before = lstm(x)[0]
    with torch.no_grad():
        lstm.weight_hh_l0_g.mul_(2)
    after = lstm(x)[0]
    assert not torch.equal(after, before)
    wnconvert.fold(lstm)
    assert torch.allclose(lstm(x)[0], after, atol=1e-6)
    assert lstm._flat_weights[1] is lstm.weight_hh_l0
    lstm.flatten_parameters()


def test_attention_reads_the_split_output_projection() -> None:
    # torch's legacy weight norm on out_proj is inert: its forward pass, and so the hook, never runs.
    attention = wnconvert.apply(nn.MultiheadAttention(8, 2)).model
    x = torch.randn(3, 2, 8)
    before = attention(x, x, x)[0]
    with torch.no_grad():
        attention.out_proj.weight_g.mul_(2)
    assert not torch.allclose(attention(x, x, x)[0], before)


def test_the_fast_path_of_the_encoder_is_still_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x, calls = torch.randn(2, 3, 8), []
    kernel = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: (calls.append(1), kernel(*a))[1])
    with torch.no_grad():
        expected = layer(x)
        wnconvert.apply(layer)
        assert reference.same_bits(layer(x), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("build", [lambda: nn.LazyLinear(3), lambda: nn.Sequential(nn.LazyConv2d(3, 3))])
def test_lazy_layers_are_a_clear_error(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(InputError, match=r"weight: a lazy layer has no shape yet; run one forward pass"):
        wnconvert.apply(build())


def test_a_channels_last_weight_stays_so() -> None:
    # torch's own weight norm gives a contiguous weight, and the convolution then converts it on every step.
    module = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    wnconvert.apply(module)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    wnconvert.fold(module)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_layers_on_the_meta_device_are_skipped_with_the_reason() -> None:
    with torch.device("meta"):
        module = nn.Linear(3, 3)
    assert wnconvert.apply(module).report.rows[0].reason == "has no data (meta device)"


# --- scripting, tracing, compiling, distributing ------------------------------------------------------------------


def test_scripting_says_to_fold_first_and_works_after() -> None:
    module = nn.Sequential(wnconvert.apply(nn.Linear(4, 3)).model)
    with pytest.raises(UsageError, match=r"torch\.jit\.script cannot carry WeightNormLinear: wnconvert\.fold"):
        torch.jit.script(module)
    scripted = torch.jit.script(wnconvert.fold(module).model)
    assert torch.equal(scripted(torch.ones(1, 4)), module(torch.ones(1, 4)))


def test_a_script_trace_keeps_the_formula() -> None:
    module = wnconvert.apply(nn.Linear(4, 3)).model.eval()
    traced = torch.jit.trace(module, torch.ones(1, 4))
    with torch.no_grad():
        traced.weight_g.mul_(2)
    assert torch.allclose(traced(torch.ones(1, 4)) - module.bias, 2 * (_plain(module)(torch.ones(1, 4)) - module.bias))


def _plain(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.weight_g.div_(2)
    return twin


def test_an_fx_trace_keeps_the_layers_and_follows_their_magnitudes() -> None:
    module = wnconvert.apply(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))).model
    graph = torch.fx.symbolic_trace(module)
    x = torch.randn(2, 4)
    assert torch.equal(graph(x), module(x))
    with torch.no_grad():
        module[0].weight_g.mul_(2)
    assert torch.equal(graph(x), module(x))


def test_an_fx_trace_of_a_functional_weight_is_not_a_constant() -> None:
    module = wnconvert.apply(Functional()).model
    graph = torch.fx.symbolic_trace(module)
    x = torch.randn(2, 5)
    assert torch.equal(graph(x), module(x))
    with torch.no_grad():
        module.first_g.mul_(2)
        graph.first_g.copy_(module.first_g)
    assert torch.equal(graph(x), module(x))


def test_walking_leaves_no_trace_in_the_module() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.cache = self.layer(x) + torch.ones(2)
            return self.cache

    module = Counting()
    before = dict(vars(module))
    assert wnconvert.find(module)[0].name == "layer.weight"
    assert vars(module) == before


def test_compiled_in_one_graph() -> None:
    module = wnconvert.apply(nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 2, 3))).model
    x = torch.randn(2, 4, 9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), module(x), atol=1e-6)
    compiled(x).sum().backward()
    assert module[0].weight_g.grad is not None
    with torch.no_grad():
        module[0].weight_g.mul_(2)
    assert torch.allclose(compiled(x), module(x), atol=1e-6)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_with_live_magnitudes(strict: bool) -> None:
    module = wnconvert.apply(nn.Sequential(nn.Linear(4, 3), nn.Conv1d(2, 3, 1))).model.eval()
    x = torch.randn(1, 2, 4)
    program = torch.export.export(module, (x,), strict=strict)
    assert torch.equal(program.module()(x), module(x))
    assert {"0.weight_g", "0.weight_v", "1.weight_g", "1.weight_v"} <= set(program.state_dict)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "split"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_export_of_split_and_folded_modules(dynamo: bool, folded: bool, tmp_path: object) -> None:
    ort = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    module = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 2, 3)).eval()
    x = torch.randn(1, 4, 9)
    expected = module(x)
    wnconvert.apply(module)
    if folded:
        wnconvert.fold(module)
    path = f"{tmp_path}/model.onnx"
    torch.onnx.export(module, (x,), path, dynamo=dynamo, verbose=False)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)


def test_under_autocast() -> None:
    module = wnconvert.apply(nn.Linear(4, 3)).model
    with torch.autocast("cpu", torch.bfloat16):
        out = module(torch.randn(2, 4))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert module.weight_g.grad.dtype == torch.float32


def test_in_functional_calls_and_under_vmap() -> None:
    module = wnconvert.apply(nn.Linear(4, 3)).model
    module.weight  # noqa: B018 - a read from outside is on record now, and must not be settled against stand-ins
    x = torch.randn(5, 2, 4)
    state = {name: p.detach() for name, p in module.named_parameters()}
    doubled = {**state, "weight_g": 2 * state["weight_g"]}
    out = torch.func.functional_call(module, doubled, (x[0],))
    assert torch.allclose(out - module.bias, 2 * (module(x[0]) - module.bias), atol=1e-6)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in state.items()}
    both = torch.vmap(lambda s: torch.func.functional_call(module, s, (x[0],)))(stacked)
    assert torch.allclose(both[0], module(x[0]), atol=1e-6)
    grads = torch.func.grad(lambda s: torch.func.functional_call(module, s, (x[0],)).sum())(state)
    assert grads["weight_g"].shape == (3, 1)


def test_in_inference_mode() -> None:
    module = wnconvert.apply(nn.LSTM(3, 4)).model
    x = torch.randn(2, 1, 3)
    expected = module(x)[0]
    with torch.inference_mode():
        assert torch.allclose(module(x)[0], expected)
        assert torch.equal(module.weight_ih_l0, module.weight_ih_l0)


def test_a_whole_module_saved_by_torch_loads_and_trains(tmp_path: object) -> None:
    module = wnconvert.apply(nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 2))).model
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    twin(torch.randn(2, 1, 4))[0].sum().backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    assert all(p.grad is not None for p in twin.parameters())
