"""Small untrained models of transformers: Conv1D, tied heads, convolutions that torch's weight norm holds already."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import wnconvert
from tests import reference
from tests.networks import tensors

transformers = pytest.importorskip("transformers", reason="transformers is not installed: run scripts/fetch_models.py")

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
}


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=20)
    return transformers.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_SMALL, max_position_embeddings=20))


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SMALL, num_key_value_heads=2))


def _t5() -> nn.Module:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=60)
    return transformers.T5EncoderModel(config)


def _wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        **_SMALL, conv_dim=(16, 16), conv_kernel=(4, 4), conv_stride=(2, 2), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, num_feat_extract_layers=2,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def _tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[1, 5, 9, 2, 40]])}


def _sound() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(1, 400, generator=torch.Generator().manual_seed(0))}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]], set[str]]] = {
    "gpt2": (_gpt2, _tokens, {"Conv1D", "Linear"}),
    "bert": (_bert, _tokens, {"Linear"}),
    "llama": (_llama, _tokens, {"Linear"}),
    "t5": (_t5, _tokens, {"Linear"}),
    "wav2vec2": (_wav2vec2, _sound, {"Linear", "Conv1d"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_apply_keeps_the_function_and_fold_every_bit(name: str) -> None:
    build, inputs, kinds = MODELS[name]
    torch.manual_seed(0)
    model, given = build().eval(), inputs()

    def run(m: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            output: Any = m(**given)
            return tensors([t for t in output.values() if isinstance(t, torch.Tensor)])

    wnconvert.fold(model)  # what transformers itself keeps under weight norm (wav2vec2)
    expected, before = run(model), copy.deepcopy(model.state_dict())
    parameters = len(list(model.parameters()))

    report = wnconvert.apply(model).report

    assert {row.site.kind for row in report.rows if row.action == "split"} == kinds
    assert all(reference.same_bits(a, b) for a, b in zip(run(model), expected, strict=True))
    assert all(reference.same_bits(a, b) for a, b in zip(run(pickle.loads(pickle.dumps(model))), expected, strict=True))
    wnconvert.fold(copy.deepcopy(model))
    assert all(reference.same_bits(a, b) for a, b in zip(run(model), expected, strict=True))

    wnconvert.fold(model)

    after = model.state_dict()
    assert list(after) == list(before)
    assert all(reference.same_bits(after[key], before[key]) for key in before)
    assert len(list(model.parameters())) == parameters


def test_the_norm_that_wav2vec2_comes_with_is_folded_over_its_last_axis() -> None:
    model, given = _wav2vec2().eval(), _sound()
    with torch.no_grad():
        expected = model(**given).last_hidden_state
    (row,) = wnconvert.fold(model).report.rows
    assert row.site.name == "encoder.pos_conv_embed.conv.weight"
    assert row.site.axis == 2
    with torch.no_grad():
        assert torch.allclose(model(**given).last_hidden_state, expected, atol=1e-5)
    pickle.dumps(model)


def test_a_tied_head_is_one_pair() -> None:
    model = wnconvert.apply(_gpt2()).model
    assert model.lm_head.weight_v is model.transformer.wte.weight_v
    (row,) = [row for row in wnconvert.fold(model).report.rows if row.site.tied]
    assert {row.site.name, *row.site.tied} == {"transformer.wte.weight", "lm_head.weight"}
    assert model.lm_head.weight is model.transformer.wte.weight
