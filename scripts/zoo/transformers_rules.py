"""How single settings of a transformers configuration shrink, told by their names."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

VOCABULARY = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How far to shrink.

    Attributes:
        factor: by which widths are divided.
        side: patches along a side of an image; None leaves images as they are.
        depth: layers; None leaves them as they are.
        heads: there may be fewer heads, so that each is wide enough.
        lists: settings are lists, as they are when read from a file, where defaults are tuples.
    """

    factor: int
    side: int | None = 4
    depth: int | None = 2
    heads: bool = True
    lists: bool = False


AS_IT_IS = Recipe(1, side=None, depth=None, heads=False)
"""Nothing shrinks."""


class TokenIds:
    """Small ids for large ones: the same for the same, others for others."""

    def __init__(self) -> None:
        self._given: dict[int, int] = {}

    def __call__(self, old: int) -> int:
        if old < 32:
            return old
        return self._given.setdefault(old, VOCABULARY - 1 - len(self._given))


_DEPTH = re.compile(r"(^|_)(n_layer|layers?|depth|blocks|num_stack)$")
_NOT_DEPTH = re.compile(
    r"feature_layer|output_layer|every|period|offset|per_|dense|shared|kv_|postnet|feat_extract|num_random|"
    r"layer_interval|local_blocks|topk|target_layer|stage_num|conv_layers|vision_layer|predict_layers|insert"
)
_WIDTH = re.compile(
    r"(hidden|intermediate|embed|embd|emb|latent|proj|projection|pooler|ffn|ff|fpn|neck|head|inner|dim|width|"
    r"channels?|rank|state|conv|filters?|bottleneck|feature|units|lora|mlp|outer)(_|s$|$)|^d_|_dim|dim$"
)
_NOT_WIDTH = re.compile(
    r"^(num|max|min|input)_|^n_(?!embd|inner)|(?<!_d)(?<!^d)_heads?$|heads$|kernel|stride|dilation|padding|vocab|"
    r"codebook_size|image|patch_size|_ids?$|index|groups?$|window|num_|ratio|factor|scale|layers?$|pool|_types?$|"
    r"blocks|theta|max_|_step|length|chunk|embeddings$|resolution|hop|sampling|rate|level|mult|expansion|"
    r"feat_stride|d_conv|^state_dim|^act_dim|bbox|mel"
)
_TOKEN = re.compile(r"(_token_id|_token_index|_token_ids|_token|_pad_id|^\w+_id|_bos_id|_eos_id)$")
_VOCABULARY = re.compile(r"vocab_size|vocabulary|vocab$|codebook_size|^num_embeddings$|^num_codevectors")
_EXPERTS = re.compile(r"^(moe_)?(num|n)_(routed_|local_)?experts$|^moe_num_experts$")
_TOP = re.compile(r"experts_per_tok|moe_top_?k|^moe_k$|^top_k$|experts_per_token|expert_topk")
_TAPS = re.compile(r"index(es|s)?$|indices$|_idxs$|layer_ids|hook_ids|out_features|_layers$|cross_layers")
_STAGES = ("depths", "num_blocks", "layers", "block_sizes", "num_block_repeats", "stage_numb_of_layers")

_FIXED: dict[str, Any] = {
    "decoder_sparse_step": 1,
    "encoder_sparse_step": 1,
    "first_k_dense_replace": 1,
    "inference_num_steps": 2,
    "mask_feature_prob": 0.0,
    "mask_time_prob": 0.0,
    "max_recycles": 1,
    "max_source_positions": 64,
    "max_window_layers": 1,
    "n_group": 1,
    "num_denoising": 0,
    "num_expert_group": 1,
    "num_kv_shared_layers": 0,
    "num_parallel_samples": 2,
    "num_queries": 12,
    "num_query_tokens": 4,
    "topk_group": 1,
    "two_stage_num_proposals": 12,
    "use_cache": False,
}
_LIMITS = {
    "canvas_length": 16,
    "chunk_size": 32,
    "entity_emb_size": 16,
    "frames_per_clip": 4,
    "index_topk": 16,
    "local_attention": 16,
    "max_2d_position_embeddings": 128,
    "max_position_embeddings": 512,
    "max_target_positions": 64,
    "model_max_length": 512,
    "n_ctx": 512,
    "n_positions": 512,
    "num_hash_buckets": 64,
    "num_latents": 8,
    "num_negatives": 4,
    "num_proposals": 12,
    "prompt_length": 4,
    "sliding_window": 16,
}


def is_count(value: Any) -> bool:
    """Whether a setting is a positive number of something."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_taps(key: str, value: Any) -> bool:
    """Whether a setting lists layers by number."""
    if not isinstance(value, (list, tuple)) or not value or not all(type(item) is int for item in value):
        return False
    return bool(_TAPS.search(key)) and "proj" not in key


def shrink(key: str, value: Any, recipe: Recipe, depth: int | None, ids: TokenIds) -> Any:
    """One setting made small.

    Args:
        key: its name.
        value: as the class has it.
        recipe: how far.
        depth: the number of layers of this configuration, if that has become smaller.
        ids: of tokens.
    """
    if recipe == AS_IT_IS:
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
        return type(value)(_shrink_list(key, list(value), recipe, depth, ids))
    if key in _FIXED and value is not None and not isinstance(value, (list, tuple)):
        return _FIXED[key]
    return _shrink_count(key, value, recipe, depth, ids) if is_count(value) else value


def _shrink_count(key: str, value: int, recipe: Recipe, depth: int | None, ids: TokenIds) -> int:
    if key == "upsample_groups":
        return max(1, value // recipe.factor)
    if _TOKEN.search(key):
        return ids(value)
    if "image_size" in key or key == "img_size":
        return _image(value, recipe)
    if recipe.depth is not None and _DEPTH.search(key) and not _NOT_DEPTH.search(key):
        return min(value, depth or recipe.depth)
    limit = _LIMITS.get(key) or next((limit for rule, limit in _BY_RULE if rule.search(key)), None)
    return _width(key, value, recipe.factor) if limit is None else min(value, limit)


_BY_RULE = ((_VOCABULARY, VOCABULARY), (_EXPERTS, 4), (_TOP, 2))


def _shrink_list(key: str, value: list[Any], recipe: Recipe, depth: int | None, ids: TokenIds) -> list[Any]:
    if key in _STAGES:
        return [min(item, 1) if recipe.depth else item for item in value]
    if "image_size" in key:
        least = min(value)
        return [_image(least, recipe) * item // least for item in value]
    if _TOKEN.search(key):
        return [ids(item) for item in value]
    if is_taps(key, value):
        return value if depth is None else _shrink_taps(value, depth)
    return [_width(key, item, recipe.factor) for item in value]


def _shrink_taps(value: list[int], depth: int) -> list[int]:
    """As many layers, in the same order, near the first one; those counted from the end near the last."""
    low = sorted({item for item in value if item >= 0})
    high = sorted({item for item in value if item < 0}, reverse=True)
    first = 0 if 0 in low else 1
    place = {item: min(i + first, depth - (0 if i + first == depth else 1)) for i, item in enumerate(low)}
    place |= {item: max(-1 - i, -depth) for i, item in enumerate(high)}
    return [place[item] for item in value]


def _image(value: int, recipe: Recipe) -> int:
    return value if recipe.side is None else min(value, recipe.side * (16 if value % 14 else 14))


def _width(key: str, value: int, factor: int) -> int:
    if value < 16 or not _WIDTH.search(key) or _NOT_WIDTH.search(key):
        return value
    return value // factor if value % factor == 0 else max(4, math.ceil(value / factor))
