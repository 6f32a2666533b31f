"""Which inputs to call a network of transformers with, in the order in which they are worth a try."""

from __future__ import annotations

import re
from collections.abc import Generator

from torch import nn

from zoo import transformers_overrides as overrides
from zoo.outputs import Inputs
from zoo.transformers_inputs import Maker

_SENSES = ("pixel_values", "input_features", "input_values", "bbox", "flattened_patches", "image_grid_thw")
"""Parameters to fill in although they have a default: a network that can see should."""

_MORE = (
    *("spatial_shapes", "pixel_attention_mask", "visual_feats", "visual_pos", "visual_embeds", "visual_attention_mask"),
    *("context_input_ids", "context_attention_mask", "doc_scores", "input_features_mask", "feature_attention_mask"),
    *("image_sizes", "aspect_ratio_ids", "aspect_ratio_mask", "qformer_input_ids", "attention_mask"),
    *("past_observed_mask", "target_sizes"),
)
"""Parameters that some networks miss although they have a default."""

_SHAPES: tuple[dict[str, int], ...] = (
    {},
    {"mel_last": 1},
    {"wave_rank": 3},
    {"wave_rank": 2},
    {"samples": 1920 * 4},
    {"image": 128},
    {"image": 224},
    {"pixel_rank": 5, "frames": 4},
    {"pixel_rank": 5, "frames": 8},
    {"pixel_rank": 6},
)
"""What may be different from the usual, tried in turn."""

_HINTS = 4
"""How often an error may tell more."""


def calls(model: nn.Module, *, shrink: bool = False) -> Generator[Inputs, Exception, None]:
    """Yield inputs until some work. Receives what went wrong, which may tell what to do better.

    Args:
        model: the network.
        shrink: try images smaller than the network is made for first.
    """
    shapes = sorted(_SHAPES, key=lambda shape: "image" not in shape) if shrink else _SHAPES
    tried: set[str] = set()
    given = overrides.inputs(Maker(model, model.config))
    if given is not None:
        yield Inputs((), given)
    for names in _choices(Maker(model, model.config)):
        for shape in shapes:
            sizes = dict(shape)
            for _ in range(_HINTS):
                found = Inputs((), Maker(model, model.config, sizes).make(names))
                if str(found) in tried:
                    break
                tried.add(str(found))
                error = yield found
                if not _learn(sizes, error):
                    break


def _choices(maker: Maker) -> list[list[str]]:
    """Names of the parameters to fill in."""
    main = type(maker.model).main_input_name
    least = [*maker.required(), *([main] if isinstance(main, str) else main)]
    if getattr(maker.config, "is_encoder_decoder", False):
        least.append("decoder_input_ids")
    senses = [name for name in _SENSES if name in maker.parameters]
    more = [name for name in _MORE if name in maker.parameters]
    choices = (
        [*least, *senses],
        [name for name in least if name != "decoder_input_ids"],
        [*least, *senses, *more],
        [*least, *senses[:1]],
        least,
        [*least, "decoder_input_ids"],
        [*least, "input_ids"],
        ["inputs_embeds" if name == "input_ids" else name for name in least],
    )
    return [list(names) for names in dict.fromkeys(tuple(dict.fromkeys(choice)) for choice in choices)]


def _learn(sizes: dict[str, int], error: Exception) -> bool:
    """Take a hint from an error; whether there was one."""
    before, text = dict(sizes), str(error)
    if match := re.search(r"(?i)(image|video|audio)?[^,;]*tokens:? *(\d+),? *features:? *(\d+)", text):
        sizes[f"{(match[1] or 'image').lower()}_tokens"] = int(match[3])
    if match := re.search(r"expected the mel input features to be of length (\d+)", text):
        sizes["frames"] = int(match[1])
    if match := re.search(r"to be a multiple of [^(]*\((\d+)\)", text):
        sizes["frames"] = int(match[1])
    return sizes != before
