"""Tiny configurations for transformers: the defaults of a class, shrunk in proportion.

Widths are divided by one common factor, so that every relation between them (heads times size of a head, encoder and
decoder, tower and projector) stays as the class has it. Depths, vocabularies and images shrink to fixed sizes.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.transformers_rules import VOCABULARY, Recipe, TokenIds, is_count, is_taps, shrink

_DEPTHS = ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "layers", "num_blocks", "encoder_layers"]
_WIDTHS = ("embed_dim", "hidden_size", "d_model", "n_embd", "dim", "hidden_dim", "encoder_hidden_size")
_HEADS = (
    *("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads", "encoder_attention_heads"),
    *("decoder_attention_heads", "nhead"),
)
_SHARED_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "encoder_num_key_value_heads")
_LEFT_OUT = {
    *("transformers_version", "dtype", "id2label", "label2id", "architectures", "problem_type"),
    *("stage_names", "out_features"),
}
_MISSING: dict[str, Any] = {
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "prediction_length": 8,
    "rope_theta": 10000.0,
    "topk_group": 1,
    "vocab_size": VOCABULARY,
}
"""For settings whose default is None although no network can be built so."""


def tiny(config: Any, recipe: Recipe, changes: Mapping[str, Any] | None = None, ids: TokenIds | None = None) -> Any:
    """Shrink a configuration and everything inside it.

    Args:
        config: with the defaults.
        recipe: how far.
        changes: values to set in addition, with dots for configurations inside: `text_config.num_layers`.
        ids: shared by all configurations of one network.
    """
    ids, changes = ids or TokenIds(), changes or {}
    fields = _fields(config)
    count, chosen = _layers(fields, recipe)
    values: dict[str, Any] = {}
    for key, value in fields.items():
        if _is_config(value):
            inner = {name.split(".", 1)[1]: item for name, item in changes.items() if name.startswith(f"{key}.")}
            values[key] = tiny(value, recipe, inner, ids)
        elif chosen and isinstance(value, (list, tuple)) and len(value) == count:
            values[key] = shrink(key, type(value)(value[i] for i in chosen), recipe, len(chosen), ids)
        else:
            values[key] = shrink(key, copy.deepcopy(value), recipe, len(chosen) or None, ids)
    if recipe.heads:
        _fit_heads(fields, values)
    _fit_sections(values)
    values |= {key: value for key, value in changes.items() if "." not in key}
    if recipe.lists:
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return type(config)(**values)


def add_sections(config: Any) -> None:
    """Give rotary embeddings the sections that the code of their family takes for granted."""
    for value in vars(config).values():
        if _is_config(value):
            add_sections(value)
    if isinstance(vars(config).get("rope_parameters"), dict):
        codes = Path(inspect.getfile(type(config))).parent.glob("modeling_*.py")
        if any('get("mrope_section", [' in code.read_text() for code in codes):
            _fit_sections(vars(config), missing=True)


def _is_config(value: Any) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)


def _fields(config: Any) -> dict[str, Any]:
    """What the constructor takes, with the values that it has settled on."""
    held = vars(config)
    names = {field.name for field in dataclasses.fields(config)}
    found = {
        key: _MISSING.get(key) if value is None else value
        for key, value in held.items()
        if not key.startswith("_") and key not in _LEFT_OUT and (key in names or _is_config(value))
    }
    if held.get("_out_indices") is not None:
        found["out_indices"] = list(held["_out_indices"])
    width, heads = found.get("hidden_size"), found.get("num_attention_heads")
    if is_count(width) and is_count(heads):
        for key, value in (("head_dim", width // heads), ("num_key_value_heads", heads)):
            if key in found and found[key] is None:
                found[key] = value
    return found


def _layers(fields: Mapping[str, Any], recipe: Recipe) -> tuple[int, list[int]]:
    """The number of layers, and those to keep so that every kind of layer stays. Nothing to keep leaves all."""
    count = next((fields[key] for key in _DEPTHS if is_count(fields.get(key))), 0)
    taps = [len(v) + 1 for k, v in fields.items() if is_taps(k, v) and len(v) < count and max(v) <= count]
    depth = max([recipe.depth or count, *taps])
    if count <= depth:
        return 0, []
    lists = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == count]
    kinds: dict[str, int] = {}
    for i in range(count):
        kinds.setdefault(str([v[i] for v in lists if isinstance(v[i], (str, bool, int))]), i)
    chosen = sorted(kinds.values())[:4] if lists else []
    rest = [i for i in range(count) if i not in chosen]
    return count, sorted([*chosen, *rest[: max(0, depth - len(chosen))]])


def _fit_heads(fields: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Let heads be at least eight wide: rotary embeddings cut them into quarters."""
    heads = {key: fields[key] for key in _HEADS if is_count(fields.get(key))}
    width = next((key for key in _WIDTHS if is_count(fields.get(key)) and is_count(values.get(key))), None)
    if width is None or not heads:
        return
    first, size = next(iter(heads)), fields.get("head_dim")
    if is_count(size) and size * heads[first] != fields[width]:
        values["head_dim"] = max(8, -(-values["head_dim"] // 4) * 4)
        return
    for key, old in heads.items():
        counts = [n for n in range(old, 0, -1) if values[width] % n == 0]
        values[key] = next((n for n in counts if old % n == 0 and values[width] % (8 * n) == 0), counts[0])
        for other in _SHARED_HEADS:
            if is_count(fields.get(other)):
                values[other] = max(1, fields[other] * values[key] // old)
    if is_count(size):
        values["head_dim"] = values[width] // values[first]


def _fit_sections(values: dict[str, Any], *, missing: bool = False) -> None:
    """Let the sections of a rotary embedding add up to half a head."""
    rope, size, width = values.get("rope_parameters"), values.get("head_dim"), values.get("hidden_size")
    heads = values.get("num_attention_heads")
    if size is None and is_count(heads) and is_count(width):
        size = width // heads
    if not isinstance(rope, dict) or not is_count(size):
        return
    for part in (rope, *(item for item in rope.values() if isinstance(item, dict))):
        if "mrope_section" in part or (missing and "rope_type" in part):
            half = int(size * (part.get("partial_rotary_factor") or 1)) // 2
            side = half * 3 // 8
            part["mrope_section"] = [side, side, half - 2 * side]
