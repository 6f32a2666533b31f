"""Inputs for transformers, made from the parameters of a forward pass and the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 8
FRAMES = 4


class Maker:
    """Makes inputs for one network.

    Attributes:
        sizes: what is different from the usual, by name: `image`, `frames`, `mel_last`, `image_tokens` and so on.
    """

    def __init__(self, model: nn.Module, config: Any, sizes: Mapping[str, int] | None = None) -> None:
        self.model, self.config = model, config
        self.sizes = dict(sizes or {})
        self.generator = torch.Generator().manual_seed(1)
        parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
        self.parameters = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}

    def required(self) -> list[str]:
        """Parameters without a default."""
        return [name for name, p in self.parameters.items() if p.default is p.empty]

    def make(self, names: list[str]) -> dict[str, Any]:
        """Inputs by name; parameters that nothing is known of are left out."""
        found: dict[str, Any] = {}
        for name in names:
            if name in self.parameters or "kwargs" in name:
                maker = _MAKERS.get(name)
                value = None if maker is None else maker(self)
                if value is not None:
                    found[name] = value
        return found

    def find(self, *names: str, default: Any = None, prefer: str = "") -> Any:
        """The first of these settings in the configuration or in one inside it, breadth first."""
        queue = [self.config]
        if prefer and getattr(self.config, prefer, None) is not None:
            queue.insert(0, getattr(self.config, prefer))
        seen = []
        while queue:
            config = queue.pop(0)
            for name in names:
                value = vars(config).get(name, getattr(type(config), name, None))
                if value is None and name in getattr(config, "attribute_map", {}):
                    value = getattr(config, name, None)
                if value is not None and not callable(value) and not isinstance(value, property):
                    return value
            seen.append(config)
            queue += [v for v in vars(config).values() if hasattr(v, "to_dict") and v not in seen]
        return default

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    @property
    def tokens(self) -> int:
        return self.sizes.get("tokens", TOKENS)


def _vocabulary(maker: Maker, prefer: str) -> int:
    return int(maker.find("vocab_size", "text_vocab_size", "input_vocab_size", default=64, prefer=prefer))


def _input_ids(maker: Maker) -> Tensor:
    vocabulary = _vocabulary(maker, "text_config")
    ids = maker.integers(min(vocabulary, 32), 1, maker.tokens, low=6 if vocabulary > 8 else 0)
    # Placeholders for images, sounds and videos, as many as the error for one of them asked for.
    position = 1
    for kind in ("image", "video", "audio"):
        count = maker.sizes.get(kind + "_tokens", 0)
        token = maker.find(*_PLACEHOLDERS[kind])
        if count and isinstance(token, int):
            ids = torch.cat([ids[:, :position], torch.full((1, count), token), ids[:, position:]], 1)
            position += count
    eos = maker.find("eos_token_id", prefer="text_config")
    if "MultipleChoice" in type(maker.model).__name__:
        ids = torch.stack([ids, ids.flip(-1)], 1)
    # Sequence heads read the state of the last token, and some look for it.
    if isinstance(eos, int) and 0 <= eos < vocabulary:
        ids[..., -1] = eos
    return ids


_PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index", "img_context_token_id", "media_token_id", "image_patch_id"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index", "audio_placeholder_token_id"),
}


def _decoder_ids(maker: Maker) -> Tensor:
    vocabulary = _vocabulary(maker, "decoder")
    return maker.integers(min(vocabulary, 32), 1, 4, low=6 if vocabulary > 8 else 0)


def _image_side(maker: Maker) -> tuple[int, int]:
    if "image" in maker.sizes:
        return maker.sizes["image"], maker.sizes["image"]
    size = maker.find("image_size", "img_size", "crop_size", prefer="vision_config", default=64)
    if isinstance(size, Mapping):
        return int(size.get("height", 64)), int(size.get("width", 64))
    if isinstance(size, (list, tuple)):
        return (int(size[0]), int(size[-1])) if size else (64, 64)
    return int(size), int(size)


def _pixels(maker: Maker) -> Tensor:
    if {"grid_thw", "image_grid_thw", "grid_hws"} & set(maker.parameters):
        return maker.noise(
            16, _patch_values(maker) * int(maker.find("temporal_patch_size", prefer="vision_config", default=1))
        )
    if "spatial_shapes" in maker.parameters:
        return maker.noise(1, 16, _patch_values(maker))
    height, width = _image_side(maker)
    channels = maker.find(
        "num_channels", "in_channels", "in_chans", "input_channels", prefer="vision_config", default=3
    )
    channels = channels if isinstance(channels, int) else 3
    frames = maker.find("num_frames", "frame_count")
    shape = (channels, height, width)
    rank = maker.sizes.get("pixel_rank", 5 if frames and "video" in _name(maker) else 4)
    if rank == 5:
        return maker.noise(1, maker.sizes.get("frames", int(frames or 1)), *shape)
    if rank == 6:
        return maker.noise(1, 1, maker.sizes.get("frames", 1), *shape)
    return maker.noise(1, *shape)


def _patch_values(maker: Maker) -> int:
    channels = maker.find("in_channels", "num_channels", "in_chans", "in_channel", prefer="vision_config", default=3)
    return int(channels) * int(maker.find("patch_size", "spatial_patch_size", prefer="vision_config", default=14)) ** 2


def _name(maker: Maker) -> str:
    return type(maker.model).__module__.rsplit(".", 1)[-1].lower() + str(getattr(maker.model, "input_modalities", ""))


def _video(maker: Maker) -> Tensor:
    height, width = _image_side(maker)
    frames = maker.find("num_frames", "frames_per_clip", default=FRAMES)
    return maker.noise(1, int(frames), 3, height, width)


def _waveform(maker: Maker) -> Tensor:
    length = maker.sizes.get("samples", 2000)
    channels = maker.find("audio_channels", "input_channels", default=None)
    rank = maker.sizes.get("wave_rank", 3 if channels else 2)
    if maker.find("max_length") and maker.find("num_mel_bins") and maker.find("frequency_stride"):
        return maker.noise(1, int(maker.find("max_length")), int(maker.find("num_mel_bins")))
    return maker.noise(1, int(channels or 1), length) if rank == 3 else maker.noise(1, length)


def _spectrogram(maker: Maker) -> Tensor:
    bins = maker.find(
        *("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "input_feat_size"),
        *("feature_projection_input_dim", "n_mel_bins", "input_dim", "input_size", "num_features"),
        default=80,
        prefer="audio_config",
    )
    length = maker.sizes.get("frames", 64)
    positions = maker.find("max_source_positions", prefer="audio_config")
    if positions and "frames" not in maker.sizes:
        length = 2 * int(positions)
    order = maker.sizes.get("mel_last", 0)
    return maker.noise(1, length, int(bins)) if order else maker.noise(1, int(bins), length)


def _spectrogram_mask(maker: Maker) -> Tensor:
    return torch.ones(1, _spectrogram(maker).shape[-1 - maker.sizes.get("mel_last", 0)], dtype=torch.long)


def _past_values(maker: Maker) -> Tensor:
    lags = maker.find("lags_sequence") or [0]
    length = maker.find("context_length", "prediction_length", default=16) + max(lags)
    channels = maker.find("num_input_channels", "input_size", default=1)
    if maker.find("lags_sequence"):
        return maker.noise(1, length) if channels == 1 else maker.noise(1, length, channels)
    return maker.noise(1, length, channels)


def _time_features(maker: Maker) -> Tensor:
    values = _past_values(maker)
    return maker.noise(1, values.shape[1], int(maker.find("num_time_features", default=0)))


def _hidden(maker: Maker) -> Tensor:
    if "grid_thw" in maker.parameters:
        return _pixels(maker)
    width = maker.find("hidden_size", "d_model", "n_embd", "embed_dim", "dim", default=32)
    width = width if isinstance(width, int) else 32
    return maker.noise(1, maker.tokens, int(width))


def _grid(_: Maker) -> Tensor:
    return torch.tensor([[1, 4, 4]])


def _boxes(maker: Maker) -> Tensor:
    corners = maker.integers(50, 1, maker.tokens, 4).sort(-1).values
    return corners[..., [0, 2, 1, 3]].sort(-1).values


_MAKERS: dict[str, Callable[[Maker], Any]] = {
    "input_ids": _input_ids,
    "decoder_input_ids": _decoder_ids,
    "attention_mask": lambda m: torch.ones_like(_input_ids(m)) if "input_ids" in m.parameters else None,
    "pixel_values": _pixels,
    "image": _pixels,
    "pixel_values_videos": _video,
    "input_values": _waveform,
    "decoder_input_values": lambda m: m.noise(1, 4, int(m.find("num_mel_bins", default=80))),
    "input_features": _spectrogram,
    "past_values": _past_values,
    "past_time_features": _time_features,
    "past_observed_mask": lambda m: torch.ones_like(_past_values(m)),
    "hidden_states": _hidden,
    "inputs_embeds": _hidden,
    "encoder_hidden_states": _hidden,
    "grid_thw": _grid,
    "spatial_shapes": lambda _: torch.tensor([[4, 4]]),
    "pixel_attention_mask": lambda m: torch.ones(1, 16, dtype=torch.long) if "spatial_shapes" in m.parameters else None,
    "merge_sizes": lambda m: torch.tensor([int(m.find("spatial_merge_size", default=1))]),
    "visual_feats": lambda m: m.noise(1, 4, int(m.find("visual_feat_dim", default=16))),
    "visual_pos": lambda m: m.noise(1, 4, int(m.find("visual_pos_dim", default=4))).sigmoid(),
    "visual_embeds": lambda m: m.noise(1, 4, int(m.find("visual_embedding_dim", default=16))),
    "visual_attention_mask": lambda _: torch.ones(1, 4),
    "context_input_ids": _input_ids,
    "context_attention_mask": lambda m: torch.ones(1, m.tokens, dtype=torch.long),
    "doc_scores": lambda m: m.noise(1, 1),
    "input_features_mask": _spectrogram_mask,
    "feature_attention_mask": _spectrogram_mask,
    "aspect_ratio_ids": lambda _: torch.ones(1, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda m: torch.ones(1, 1, int(m.find("max_num_tiles", default=4)), dtype=torch.long),
    "classes_input_ids": lambda m: m.integers(30, 2, 4, low=6),
    "classes_attention_mask": lambda _: torch.ones(2, 4, dtype=torch.long),
    "tasks_input_ids": lambda m: m.integers(30, 1, 4, low=6),
    "tasks_attention_mask": lambda _: torch.ones(1, 4, dtype=torch.long),
    "classes_structure": lambda _: torch.tensor([2]),
    "task_inputs": lambda m: m.integers(30, 1, int(m.find("task_seq_len", default=8)), low=6),
    "image_sizes": lambda m: torch.tensor([_image_side(m)]),
    "boxes": lambda m: m.noise(1, 4, 4).abs(),
    "image_grid_thw": _grid,
    "bbox": _boxes,
    "spectrogram": lambda m: m.noise(1, 8, int(m.find("model_in_dim", default=80))),
    "qformer_input_ids": _input_ids,
    "flattened_patches": lambda m: m.noise(
        1, 8, 2 + 3 * int(m.find("patch_size", prefer="vision_config", default=16)) ** 2
    ),
    "input_points": lambda m: m.noise(1, 1, 1, 2).abs() * 8,
    "codebook_idx": lambda _: 1,
    "codes": lambda m: m.integers(32, 1, int(m.find("num_quantizers", default=4)), 8),
    "lang_id": lambda _: torch.zeros(1, 1, dtype=torch.long),
    "spkr_id": lambda _: torch.zeros(1, 1, dtype=torch.long),
    "speaker_id": lambda _: torch.zeros(1, 1, dtype=torch.long),
    "prompt_pixel_values": _pixels,
    "prompt_masks": _pixels,
}
