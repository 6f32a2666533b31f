"""Infer the kind of each weight of a checkpoint from key names, ranks and the biases beside them. No torch needed.

A weight without a layer can only be guessed at, so every guess carries its evidence, and what stays ambiguous is of
kind `Unknown`, which is left out unless asked for.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from wnconvert import kinds
from wnconvert.sites import Axis, Use

_KINDS = {row.name: row for row in kinds.MODULES}
_CONV = {3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}
_CONV_TRANSPOSE = {3: "ConvTranspose1d", 4: "ConvTranspose2d", 5: "ConvTranspose3d"}
_GATES = {4: "LSTM", 3: "GRU", 1: "RNN"}

# All of these are searched in the last part of the layer's name that is not a number, in lower case.
_NORM_NAME = re.compile(r"norm|^bn\d*$|_bn\d*$|^ln(_|\d|$)|_ln$")
_SURELY_LINEAR = re.compile(r"proj|linear|dense|head$|^embed_out$|^lora_[ab]$|^fc\d*$|_fc\d*$")
_EMBEDDING_NAME = re.compile(r"emb|^w[tp]e$|^shared$|lookup|codebook|^relative_attention_bias$")
_LINEAR_NAME = re.compile(
    r"^(query|key|value|[qkvo]|q_?k_?v|to_.*|wi_\d|w[\dqkvoi]|c_(attn|fc)|lin\d*|gate|up|down|out|output|classifier)$"
    r"|_(query|key|value|gate|out|output|classifier)$|logit|score|mlp|ffn"
)
_TRANSPOSED_NAME = re.compile(
    r"^ups?(_?\d+)?$|deconv|upsampl|transpose|^convtr?$|^conv_?t(r|\d|$)|upconv|up_conv|tconv"
)
_CONV1D_NAME = re.compile(r"^c_(attn|proj|fc)$|^q_attn$")
_TABLE_NAME = re.compile(r"embed|_emb$|^emb_|token|_table$|position|^pos_|prompt|latent|quer(y|ies)$|^pe$")
_NOT_A_WEIGHT = re.compile(
    r"(^|_)bias(_[a-z]{1,2}(_.*)?)?$|^(beta|gamma|scale)$|^running_|_cached$|mask|^inv_freq$|^_?buffer"
)


class Weight(NamedTuple):
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str


class Guess(NamedTuple):
    """The layer a weight seems to belong to, and why."""

    use: Use
    evidence: str
    more: tuple[Use, ...] = ()
    """Its other uses, where a network tells them."""

    @property
    def uses(self) -> tuple[Use, ...]:
        """All of them."""
        return self.use, *self.more


def find(weights: Mapping[str, Weight]) -> dict[str, Guess]:
    """Guess the kind of everything that is or might be a layer's weight. Biases and buffers are passed over.

    Args:
        weights: every tensor of a checkpoint by its plain name; a pair counts as the weight that it stands for.
    """
    conv1d = _votes_for_conv1d(weights)
    found = {}
    for name in weights:
        guess = _guess(_Key(name, weights, conv1d))
        if guess is not None:
            found[name] = guess
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Key:
    """One key, with the keys beside it."""

    name: str
    weights: Mapping[str, Weight]
    conv1d: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights[self.name].shape

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def parametrized(self) -> bool:
        """Whether it is the state of one of torch's parametrizations."""
        return ".parametrizations." in f".{self.name}"

    @property
    def label(self) -> str:
        """The last part of the layer's name that says something: `ups` of `generator.ups.0.weight`."""
        parts = self.module.lower().split(".")
        return next((part for part in reversed(parts) if not part.isdigit()), "")

    @property
    def bias(self) -> tuple[int, ...] | None:
        """Shape of the bias that goes by the same name."""
        return self.beside(self.leaf.replace("weight", "bias")) if "weight" in self.leaf else None

    def beside(self, leaf: str) -> tuple[int, ...] | None:
        """Shape of another tensor of the same layer."""
        found = self.weights.get(f"{self.module}.{leaf}" if self.module else leaf)
        return None if found is None else found.shape

    def guess(self, kind: str, evidence: str, problem: str | None = None, groups: int = 1) -> Guess:
        row = _KINDS.get(kind)
        axis = 0 if row is None else row.axis
        out_axis: Axis = 0 if row is None else row.out_axis
        if groups > 1:
            out_axis = (0, 2)
        return Guess(Use(self.name, kind, self.module or self.name, axis, out_axis, groups, problem), evidence)


def _guess(key: _Key) -> Guess | None:
    if not key.shape or _NOT_A_WEIGHT.search(key.leaf):
        return None
    if key.parametrized and not key.leaf.startswith("original"):
        return None
    if "float" not in key.weights[key.name].dtype and "weight" not in key.leaf:
        return None
    return next((guess for rule in _RULES if (guess := rule(key)) is not None), None)


def _computed(key: _Key) -> Guess | None:
    """The source of a weight that something else computes: spectral norm, pruning, any other parametrization."""
    if key.parametrized:
        return key.guess("Unknown", "its name", "another parametrization computes a weight from it")
    if key.leaf.endswith("_orig"):
        return key.guess("Unknown", "its name", "spectral norm or pruning computes a weight from it")
    return None


def _recurrent(key: _Key) -> Guess | None:
    match = re.fullmatch(r"weight_(ih|hh|hr)(?P<layer>_l\d+)?(_reverse)?", key.leaf)
    if match is None or len(key.shape) != 2:
        return None
    recurrent = key.beside(key.leaf.replace("_ih", "_hh").replace("_hr", "_hh")) or key.shape
    projection = key.beside(key.leaf.replace("_ih", "_hr").replace("_hh", "_hr"))
    hidden = projection[-1] if projection else recurrent[-1]
    name = _GATES.get(recurrent[0] // hidden, "recurrent net") if hidden else "recurrent net"
    return key.guess("RNN" if match["layer"] else "RNNCell", f"named {key.leaf}, with the gates of one {name}")


def _attention(key: _Key) -> Guess | None:
    if re.fullmatch(r"in_proj_weight|[qkv]_proj_weight", key.leaf) and len(key.shape) == 2:
        return key.guess("MultiheadAttention", f"named {key.leaf}")
    return None


def _norm(key: _Key) -> Guess | None:
    if key.leaf != "weight":
        return None
    why = None
    if key.beside("running_mean") is not None:
        why = "running_mean beside it"
    elif key.bias == key.shape:
        why = "a bias of the same shape"
    elif _NORM_NAME.search(key.label):
        why = f"named {key.label}"
    if why is not None and (len(key.shape) == 1 or key.bias == key.shape or key.bias is None):
        return key.guess("Norm", why, "a norm layer's scale is one value per channel")
    return None


def _vector(key: _Key) -> Guess | None:
    if len(key.shape) > 1 or key.leaf != "weight":
        return None
    return key.guess("Unknown", "rank 1", "one value per channel has no direction")


def _by_bias(key: _Key) -> Guess | None:
    if key.bias is None or len(key.bias) != 1 or len(key.shape) < 2:
        return None
    rows, columns, length = key.shape[0], key.shape[1], key.bias[0]
    rank = len(key.shape)
    said = f"rank {rank}, bias of {length}"
    if rank == 2:
        if rows == columns == length:
            return _square(key, said)
        if length in (rows, columns):
            return key.guess("Linear" if length == rows else "Conv1D", _matched(said, length == rows))
        return None
    if rank not in _CONV:
        return None
    if length == rows and (length != columns or not _TRANSPOSED_NAME.search(key.label)):
        if columns == 1 < rows and _TRANSPOSED_NAME.search(key.label):
            return key.guess(_CONV_TRANSPOSE[rank], f"{said}, one channel per group, named {key.label}", groups=rows)
        kind = "Bilinear" if rank == 3 and "bilinear" in key.label else _CONV[rank]
        return key.guess(kind, f"{said} = both shape[0] and shape[1]" if length == columns else _matched(said, True))
    if length == columns:
        named = f", named {key.label}" if length == rows else ""
        return key.guess(_CONV_TRANSPOSE[rank], _matched(said, False) + named)
    groups = length // columns if columns else 0
    if groups > 1 and length == groups * columns and rows % groups == 0:
        return key.guess(_CONV_TRANSPOSE[rank], f"{said} = {groups} groups of shape[1]", groups=groups)
    return None


def _square(key: _Key, said: str) -> Guess:
    if _CONV1D_NAME.search(key.label) and key.conv1d:
        return key.guess("Conv1D", f"{said} = both shape[0] and shape[1], named {key.label}")
    return key.guess("Linear", f"{said} = both shape[0] and shape[1]; read as [out, in]")


def _matched(said: str, rows: bool) -> str:
    return f"{said} = shape[{0 if rows else 1}]"


def _by_name(key: _Key) -> Guess | None:
    """Weights named `weight` without a bias: convolutions by rank, the rest by the name of their layer."""
    if key.leaf != "weight" or key.bias is not None:
        return None
    rank, label = len(key.shape), key.label
    if rank in _CONV and "expert" not in key.module.lower():
        if _TRANSPOSED_NAME.search(label):
            return key.guess(_CONV_TRANSPOSE[rank], f"rank {rank}, no bias, named {label}")
        return key.guess(_CONV[rank], f"rank {rank}, no bias")
    if rank != 2:
        return None
    if _SURELY_LINEAR.search(label):
        return key.guess("Linear", f"rank 2, no bias, named {label}")
    if _EMBEDDING_NAME.search(label):
        return key.guess("Embedding", f"rank 2, no bias, named {label}")
    if _LINEAR_NAME.search(label):
        return key.guess("Linear", f"rank 2, no bias, named {label}")
    return None


def _table(key: _Key) -> Guess | None:
    if key.leaf == "weight" or len(key.shape) < 2 or not _TABLE_NAME.search(key.leaf.lower()):
        return None
    return key.guess("Unknown", f"named {key.leaf}", "a table of parameters, not a layer that multiplies")


def _unknown(key: _Key) -> Guess | None:
    if len(key.shape) < 2:
        return None
    return key.guess("Unknown", f"rank {len(key.shape)}, and neither its name nor a bias tells its layer")


_RULES: tuple[Callable[[_Key], Guess | None], ...] = (
    _computed,
    _recurrent,
    _attention,
    _norm,
    _vector,
    _by_bias,
    _by_name,
    _table,
    _unknown,
)


def _votes_for_conv1d(weights: Mapping[str, Weight]) -> bool:
    """Whether `c_attn`, `c_proj`, `c_fc` are GPT-2's transposed Conv1D here, as their non-square ones tell.

    Other networks use these names for a Linear.
    """
    votes: collections.Counter[bool] = collections.Counter()
    for name, weight in weights.items():
        if len(weight.shape) != 2 or weight.shape[0] == weight.shape[1]:
            continue
        key = _Key(name, weights)
        matches = key.bias in ((weight.shape[0],), (weight.shape[1],))
        if key.leaf == "weight" and matches and _CONV1D_NAME.search(key.label):
            votes[key.bias == (weight.shape[1],)] += 1
    return votes[True] >= votes[False]
