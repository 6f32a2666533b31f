"""What the keys of a checkpoint tell about its layers, checked against the layers themselves."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from torch import nn

from wnconvert.walk import keys, modules
from wnconvert.walk.keys import Guess, Weight


def _find(module: nn.Module) -> dict[str, Guess]:
    return keys.find({key: _weight(tensor) for key, tensor in module.state_dict().items()})


def _weight(tensor: object) -> Weight:
    return Weight(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))  # type: ignore[attr-defined]


def _one(shapes: dict[str, tuple[int, ...]], name: str, dtype: str = "float32") -> Guess | None:
    return keys.find({key: Weight(shape, dtype) for key, shape in shapes.items()}).get(name)


LAYERS = {
    "linear": nn.Linear(3, 4),
    "square": nn.Linear(4, 4),
    "conv1d": nn.Conv1d(3, 4, 5),
    "conv2d": nn.Conv2d(3, 4, 5, bias=False),
    "conv3d": nn.Conv3d(3, 4, 5),
    "depthwise": nn.Conv1d(4, 4, 5, groups=4),
    "grouped": nn.Conv2d(4, 8, 3, groups=2),
    "to_image": nn.ConvTranspose2d(8, 3, 4),
    "deconv": nn.ConvTranspose3d(4, 4, 2),
    "ups.0": nn.ConvTranspose1d(4, 4, 4),
    "ups.1": nn.ConvTranspose1d(8, 6, 4, groups=2),
    "upsample_all": nn.ConvTranspose1d(6, 6, 4, groups=6),
    "bilinear": nn.Bilinear(2, 3, 4),
    "lstm": nn.LSTM(3, 5, 2, bidirectional=True),
    "projected": nn.LSTM(3, 6, proj_size=2),
    "gru": nn.GRU(3, 5),
    "rnn": nn.RNN(3, 5, bias=False),
    "cell": nn.LSTMCell(3, 5),
    "attention": nn.MultiheadAttention(4, 2),
    "cross": nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False),
    "tok_embeddings": nn.Embedding(10, 4),
    "wte": nn.Embedding(10, 4),
    "q_proj": nn.Linear(4, 6, bias=False),
    "mlp.w1": nn.Linear(4, 6, bias=False),
    "head": nn.Linear(4, 6, bias=False),
    "lm_head": nn.Linear(4, 6, bias=False),
    "embed_out": nn.Linear(4, 6, bias=False),
    "embed_proj": nn.Linear(4, 6, bias=False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_told_as_they_are(name: str) -> None:
    holder = nn.Module()
    *path, leaf = name.split(".")
    inner = holder
    for part in path:
        inner.add_module(part, nn.Module())
        inner = inner.get_submodule(part)
    inner.add_module(leaf, LAYERS[name])

    guessed = {n: (g.use.kind, g.use.axis, g.use.out_axis, g.use.groups) for n, g in _find(holder).items()}

    assert guessed == {use.root: (use.kind, use.axis, use.out_axis, use.groups) for use in modules.find_uses(holder)}


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm2d(4), nn.LayerNorm(4), nn.LayerNorm((3, 4)), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)],
)
def test_norms_are_left_out_with_the_reason(module: nn.Module) -> None:
    (guess,) = _find(nn.Sequential(module)).values()

    assert guess.use.kind == "Norm"
    assert guess.use.problem == "a norm layer's scale is one value per channel"


def test_a_norm_by_name_alone() -> None:
    guess = _one({"layers.0.input_layernorm.weight": (4,)}, "layers.0.input_layernorm.weight")

    assert guess is not None
    assert guess.use.kind == "Norm"


@pytest.mark.parametrize("square", [True, False])
def test_conv1d_of_gpt2_is_told_by_its_other_layers(square: bool) -> None:
    gpt2 = {"h.c_attn.weight": (4, 12), "h.c_attn.bias": (12,), "h.c_proj.weight": (4, 4), "h.c_proj.bias": (4,)}
    linear = {"h.c_attn.weight": (12, 4), "h.c_attn.bias": (12,), "h.c_proj.weight": (4, 4), "h.c_proj.bias": (4,)}
    name = "h.c_proj.weight" if square else "h.c_attn.weight"

    transposed, plain = _one(gpt2, name), _one(linear, name)

    assert transposed is not None
    assert (transposed.use.kind, transposed.use.axis) == ("Conv1D", 1)
    assert plain is not None
    assert (plain.use.kind, plain.use.axis) == ("Linear", 0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.0.weight", (4, 5)),
        ("experts.gate_up_proj", (8, 4, 16)),
        ("experts.weight", (8, 4, 16)),
        ("mixer.A_log", (8, 4)),
        ("weight", (1, 2, 3, 4, 5, 6)),
    ],
)
def test_what_nothing_tells_stays_unknown(name: str, shape: tuple[int, ...]) -> None:
    guess = _one({name: shape}, name)

    assert guess is not None
    assert guess.use.kind == "Unknown"
    assert guess.use.problem is None


@pytest.mark.parametrize("name", ["pos_embed", "vit.cls_token", "attn.relative_position_bias_table"])
def test_tables_of_parameters_are_left_out(name: str) -> None:
    guess = _one({name: (1, 9, 4)}, name)

    assert guess is not None
    assert guess.use.problem == "a table of parameters, not a layer that multiplies"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("conv.bias", "float32"), ("bn.running_mean", "float32"), ("position_ids", "int64"), ("attn.mask", "bool")],
)
def test_biases_and_buffers_are_not_listed(name: str, dtype: str) -> None:
    assert _one({name: (4, 4)}, name, dtype) is None


def test_sources_of_other_parametrizations_are_left_alone() -> None:
    spectral = nn.utils.spectral_norm(nn.Linear(3, 4))
    orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))

    assert _find(spectral)["weight_orig"].use.problem == "spectral norm or pruning computes a weight from it"
    (guess,) = [guess for guess in _find(orthogonal).values() if guess.use.problem]
    assert guess.use.problem == "another parametrization computes a weight from it"


def test_every_guess_says_why() -> None:
    for module in LAYERS.values():
        assert all(guess.evidence for guess in _find(nn.Sequential(module)).values())


def test_time_grows_with_the_number_of_keys_only() -> None:
    def seconds(layers: int) -> float:
        shapes = {}
        for i in range(layers):
            shapes[f"layers.{i}.conv.weight"] = Weight((8, 4, 3), "float32")
            shapes[f"layers.{i}.conv.bias"] = Weight((8,), "float32")
        start = time.process_time()
        keys.find(shapes)
        return time.process_time() - start

    seconds(100)
    assert seconds(40_000) < 40 * max(seconds(4_000), 0.01)


def test_nothing_of_this_imports_torch() -> None:
    code = "import sys, wnconvert.walk.keys, wnconvert.files.safetensors, wnconvert.files.sharded; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "torch" not in result.stdout.split()
