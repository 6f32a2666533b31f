"""What the rules for tiny configurations and inputs get wrong, by family or class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from zoo.transformers_inputs import Maker

_RATIOS = ((1, "shortratio"), (2, "midratio"), (3, "longratio"))
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_INTRACLASS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{f"vertical_long_to_small_conv_{name}": [(2 * n + 1, 1), 1, (n, 0)] for n, name in _RATIOS},
    **{f"horizontal_small_to_long_conv_{name}": [(1, 2 * n + 1), 1, (0, n)] for n, name in _RATIOS},
    **{f"symmetric_conv_long_{name}": [2 * n + 1, 1, n] for n, name in _RATIOS},
}
"""Kernel, stride and padding of the convolutions in a text detector."""


def _everywhere(**settings: Any) -> dict[str, Any]:
    """Settings of a language model, alone or inside another network."""
    return {f"{prefix}{key}": value for prefix in ("", "text_config.") for key, value in settings.items()}


_PROMPTS = {"prompt_encoder_config.image_embedding_size": 4, "prompt_encoder_config.image_size": 64}
_LEVELS = [[16, 16], [8, 8], [4, 4]]
"""Sizes of the feature maps of an image of four patches by four."""

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "sam": {**_PROMPTS, "vision_config.num_pos_feats": 8},
    "sam_hq": {**_PROMPTS, "vision_config.num_pos_feats": 8},
    "sam2": {"vision_config.backbone_feature_sizes": _LEVELS, "backbone_feature_sizes": _LEVELS},
    "sam3_tracker": {"vision_config.backbone_feature_sizes": _LEVELS, "prompt_encoder_config.image_size": 56},
    "seggpt": {"merge_index": 0},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "vitmatte": {
        "fusion_hidden_sizes": [16, 8, 8, 8],
        "convstream_hidden_sizes": [8, 8, 8],
        "hidden_size": 48,
        "backbone_config.num_channels": 4,
    },
    "blip_2": {"image_token_index": 200, "qformer_config.use_qformer_text_input": True},
    "instructblip": {"image_token_index": 200},
    "instructblipvideo": {"video_token_index": 200},
    "cohere_compass": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
        "text_config.rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "esm": {"pad_token_id": 1, "mask_token_id": 32, "vocab_size": 33},
    "moonshine_streaming": {"num_key_value_heads": 2, "num_attention_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "fast_vlm": {"vision_config.hidden_size": 3072},
    "emu3": {"vq_config.base_channels": 32, "vocabulary_map": {"<image>": 250}},
    "janus": {"vq_config.base_channels": 32},
    "mask2former": {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64},
    "oneformer": {"conv_dim": 64, "mask_dim": 64, "hidden_dim": 64},
    "timm_backbone": {"backbone": "resnet18"},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "pix2struct": {"vision_config.patch_embed_hidden_size": 768, "patch_embed_hidden_size": 768},
    "ViltForImagesAndTextClassification": {"num_images": 2, "modality_type_vocab_size": 3},
    "DetrForSegmentation": {"d_model": 256, "backbone_config.out_indices": [1, 2, 3, 4]},
    "chameleon": {"vocabulary_map": {"<image>": 250}, "vq_config.base_channels": 32},
    "JanusVQVAE": {"base_channels": 32, "num_patches": 4},
    "dots3_note": {"adapter_input_size": 80, "audio_config.adapter_input_size": 80},
    "edgetam": {
        "backbone_channel_list": [2048, 1024, 512, 256],
        "vision_config.backbone_channel_list": [2048, 1024, 512, 256],
    },
    "step3p7": {"sliding_window": 16, "text_config.sliding_window": 16},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "maskformer": {"mask_feature_size": 64, "fpn_feature_size": 64},
    "xcodec": {"codebook_dim": 112},
    "BridgeTowerForContrastiveLearning": {"logit_scale_init_value": 2.6592},
    "bros": {"hidden_size": 128, "num_attention_heads": 8},
    "bridgetower": {
        "hidden_size": 64,
        "text_config.hidden_size": 64,
        "vision_config.hidden_size": 64,
        "text_config.num_attention_heads": 4,
        "num_attention_heads": 4,
        "contrastive_hidden_size": 32,
    },
    "nemotron_h": {"moe_latent_size": 32, "moe_intermediate_size": 32},
    "nemotron_h_omni": {"text_config.moe_latent_size": 32, "text_config.moe_intermediate_size": 32},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
        "num_layers": 2,
    },
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8},
    "hiera": {"decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"], "mlp_layer_types": ["dense", "sparse"]},
    "pp_doclayout_v2": {"class_thresholds": [0.5] * 32, "class_order": list(range(32))},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
        "qformer_config.num_attention_heads": 2,
    },
    "perceiver": {"num_cross_attention_heads": 1, "num_self_attention_heads": 1, "train_size": [16, 16]},
    "Pix2StructTextModel": {"initializer_range": 0.02},
    "diffusion_gemma": _everywhere(num_experts=4, top_k_experts=2, moe_intermediate_size=16),
    "BeitForSemanticSegmentation": {"out_indices": [1, 2, 3, 4], "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen4_exp": _everywhere(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=64, indexer_budget=16, indexer_compress_ratio=4
    ),
    "llama4": {"vision_config.intermediate_size": 192},
    "Llama4VisionModel": {"intermediate_size": 192},
    "ShieldGemma2ForImageClassification": {"mm_tokens_per_image": 4},
    "sapiens2": {
        "head_config.upsample_out_channels": [16, 16],
        "head_config.conv_out_channels": [16],
        "head_config.scale_conv_out_channels": [8],
        "head_config.scale_final_hidden_sizes": [8],
    },
    "pp_ocrv5_server_det": {"intraclass_block_config": _INTRACLASS, "scale_factor_list": [1, 2, 4, 8]},
    "pp_ocrv6_medium_det": {"intraclass_block_config": _INTRACLASS, "scale_factor_list": [1, 2, 4, 8]},
    "nemotron3_5_asr": {"default_prompt_id": 3},
    "gemma4_assistant": {
        "text_config.hidden_size_per_layer_input": 0,
        "text_config.vocab_size_per_layer_input": 0,
        "text_config.num_kv_shared_layers": 2,
    },
    "Qwen2_5OmniTalkerForConditionalGeneration": {"embedding_size": 3584},
}
"""Settings by the name of a family (the folder of its code) or of a class."""


def changes(cls: type) -> dict[str, Any]:
    """Settings for one class, those of its family included."""
    return {**CONFIGS.get(_family(cls), {}), **CONFIGS.get(cls.__name__, {})}


def inputs(maker: Maker) -> dict[str, Any] | None:
    """Inputs for one class that the names of its parameters do not tell."""
    cls = type(maker.model)
    made = _INPUTS.get(cls.__name__) or _INPUTS.get(_family(cls))
    return None if made is None else made(maker)


def _family(cls: type) -> str:
    return cls.__module__.split(".")[2]


def _ids(maker: Maker, *shape: int) -> torch.Tensor:
    return maker.integers(30, *shape, low=6)


def _luke(maker: Maker) -> dict[str, Any]:
    spans = 2 if "Pair" in type(maker.model).__name__ else 1
    positions = torch.full((1, spans, 30), -1)
    positions[..., 0] = 1
    made = {"input_ids": _ids(maker, 1, 8), "entity_ids": torch.ones(1, spans, dtype=torch.long)}
    made |= {"entity_position_ids": positions, "entity_attention_mask": torch.ones(1, spans, dtype=torch.long)}
    if "Span" in type(maker.model).__name__:
        made |= {"entity_start_positions": torch.tensor([[1]]), "entity_end_positions": torch.tensor([[2]])}
    return made


def _rag(maker: Maker) -> dict[str, Any]:
    docs = maker.config.n_docs
    return {
        "input_ids": _ids(maker, 1, 8),
        "context_input_ids": _ids(maker, docs, 8),
        "context_attention_mask": torch.ones(docs, 8, dtype=torch.long),
        "doc_scores": maker.noise(1, docs),
        "decoder_input_ids": _ids(maker, 1, 4),
    }


def _codebooks(maker: Maker) -> dict[str, Any]:
    books = maker.find("num_codebooks", default=4)
    name = "decoder_input_ids" if "decoder_input_ids" in maker.parameters else "input_ids"
    found = {name: _ids(maker, int(books), 4)}
    return found if name == "input_ids" else {"input_ids": _ids(maker, 1, 8), **found}


def _map(channels: int, height: int = 8, width: int = 8) -> Callable[[Maker], dict[str, Any]]:
    return lambda maker: {"hidden_states": maker.noise(1, channels, height, width)}


def _clap(maker: Maker) -> dict[str, Any]:
    found = {"input_features": maker.noise(1, 1, 1001, 64), "is_longer": torch.tensor([[True]])}
    return {"input_ids": _ids(maker, 1, 8), **found} if "input_ids" in maker.parameters else found


def _qformer(maker: Maker) -> dict[str, Any]:
    config = maker.config
    return {
        "query_embeds": maker.noise(1, 4, config.hidden_size),
        "encoder_hidden_states": maker.noise(1, 8, config.encoder_hidden_size),
    }


def _flattened(maker: Maker) -> dict[str, Any]:
    patches = maker.noise(1, 4, 2 + 3 * 16 * 16)
    patches[..., :2] = torch.tensor([[1, 1], [1, 2], [2, 1], [2, 2]])
    found = {"flattened_patches": patches}
    if "decoder_input_ids" in maker.parameters:
        found["decoder_input_ids"] = _ids(maker, 1, 4)
    return found


def _kosmos(maker: Maker) -> dict[str, Any]:
    size = maker.find("image_size", prefer="vision_config")
    count = maker.find("latent_query_num")
    mask = torch.zeros(1, count + 8, dtype=torch.long)
    mask[:, 1 : 1 + count] = 1
    found = {"pixel_values": maker.noise(1, 3, size, size), "input_ids": _ids(maker, 1, count + 8)}
    return {**found, "image_embeds_position_mask": mask}


def _idefics(maker: Maker) -> dict[str, Any]:
    size = maker.find("image_size", prefer="vision_config")
    return {
        "input_ids": _ids(maker, 1, 8),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "pixel_values": maker.noise(1, 1, 3, size, size),
        "image_attention_mask": torch.ones(1, 8, 1, dtype=torch.long),
    }


def _perceiver(maker: Maker) -> dict[str, Any]:
    name = type(maker.model).__name__
    if name == "PerceiverModel":
        return {"inputs": maker.noise(1, 8, maker.config.d_model)}
    if "Image" in name:
        return {"inputs": maker.noise(1, 3, 224, 224)}
    if "Flow" in name:
        return {"inputs": maker.noise(1, 2, 27, *maker.config.train_size)}
    return {"inputs": maker.integers(200, 1, 8)}


def _ids_with(maker: Maker, setting: str, count: int) -> dict[str, Any]:
    ids = _ids(maker, 1, 8)
    ids[:, 1 : 1 + 2 * count : 2] = getattr(maker.config, setting)
    return {"input_ids": ids}


def _grid_of_patches(maker: Maker) -> dict[str, Any]:
    size = maker.config.patch_size
    side = size if isinstance(size, int) else size[0]
    return {"pixel_values": maker.noise(16, 3, side, side), "grid_thw": torch.tensor([[1, 4, 4]])}


def _images_in_patches(maker: Maker) -> dict[str, Any]:
    side = maker.config.patch_size
    return {"pixel_values": maker.noise(1, 16, 3, side, side), "grid_thw": torch.tensor([[1, 4, 4]])}


def _pairs(maker: Maker) -> dict[str, Any]:
    height, width = maker.config.image_size
    return {
        name: maker.noise(1, 3, height // 2, width) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    }


def _frames(maker: Maker) -> dict[str, Any]:
    found = {"pixel_values_videos": maker.noise(1, 2, 3, 336, 336)}
    return {"input_ids": _ids(maker, 1, 8), **found} if "input_ids" in maker.parameters else found


def _positions(maker: Maker) -> dict[str, Any]:
    size, steps = maker.config.patch_size, torch.arange(6)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(1, 36, 2)
    return {"pixel_values": maker.noise(1, 36, 3 * size * size), "pixel_position_ids": grid}


def _square(maker: Maker) -> tuple[int, int]:
    size = maker.find("image_size", prefer="vision_config")
    return size, size


def _targets(maker: Maker) -> dict[str, Any]:
    side = maker.config.image_size // maker.config.patch_size
    return {"pixel_values": maker.noise(1, 3, *_square(maker)), "target_sizes": torch.tensor([[side, side]])}


def _temporal(maker: Maker) -> dict[str, Any]:
    width = 3 * maker.config.patch_size**2 * maker.config.patch_temporal
    return {"pixel_values": maker.noise(16, width), "grid_thw": torch.tensor([[1, 4, 4]])}


def _image_map(maker: Maker) -> dict[str, Any]:
    name = next(iter(maker.required()), "pixel_values")
    return {name: maker.noise(1, 3, 64, 64)}


def _first_map(maker: Maker) -> dict[str, Any]:
    convolutions = (module for module in maker.model.modules() if isinstance(module, torch.nn.Conv2d))
    return {"hidden_states": maker.noise(1, next(convolutions).in_channels, 8, 8)}


def _same_twice(maker: Maker) -> dict[str, Any]:
    ids = _ids(maker, 1, 8)
    ids[:, -1] = maker.config.eos_token_id
    return {"input_ids": ids, "decoder_input_ids": ids.clone()}


def _masked_video(maker: Maker) -> dict[str, Any]:
    config = maker.config
    count = (config.image_size // config.patch_size) ** 2 * (config.num_frames // config.tubelet_size)
    mask = torch.arange(count)[None] % 2 == 0
    return {"pixel_values": maker.noise(1, config.num_frames, 3, *_square(maker)), "bool_masked_pos": mask}


def _decisions(maker: Maker) -> dict[str, Any]:
    config = maker.config
    return {
        "states": maker.noise(1, 4, config.state_dim),
        "actions": maker.noise(1, 4, config.act_dim),
        "rewards": maker.noise(1, 4, 1),
        "returns_to_go": maker.noise(1, 4, 1),
        "timesteps": torch.arange(4)[None],
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
    }


def _stacked(maker: Maker) -> dict[str, Any]:
    width = next(module.in_features for module in maker.model.modules() if isinstance(module, torch.nn.Linear))
    return {"input_features": maker.noise(1, 16, width)}


def _codec(maker: Maker) -> dict[str, Any]:
    width = maker.find("feature_projection_input_dim")
    return {"input_values": maker.noise(1, 1, 3200), "input_features": maker.noise(1, 10, width)}


_INPUTS: Mapping[str, Callable[[Maker], dict[str, Any]]] = {
    "LukeForEntityClassification": _luke,
    "LukeForEntityPairClassification": _luke,
    "LukeForEntitySpanClassification": _luke,
    "RagModel": _rag,
    "RagTokenForGeneration": _rag,
    "RagSequenceForGeneration": _rag,
    "MusicgenModel": _codebooks,
    "MusicgenForCausalLM": _codebooks,
    "MusicgenForConditionalGeneration": _codebooks,
    "MusicgenMelodyModel": _codebooks,
    "MusicgenMelodyForCausalLM": _codebooks,
    "MusicgenMelodyForConditionalGeneration": _codebooks,
    "GraniteSpeechCTCEncoder": lambda m: {"hidden_states": m.noise(1, 8, m.config.input_dim)},
    "GraniteSpeechPlusCTCEncoder": lambda m: {"hidden_states": m.noise(1, 8, m.config.input_dim)},
    "CsmBackboneModel": lambda m: {"input_ids": _ids(m, 1, 4, m.config.num_codebooks)},
    "FunAsrNanoEncoder": lambda m: {
        "input_features": m.noise(1, 16, 560),
        "input_features_mask": torch.ones(1, 16, dtype=torch.long),
    },
    "LightGlueForKeypointMatching": lambda m: {"pixel_values": m.noise(1, 2, 3, 64, 64)},
    "SuperGlueForKeypointMatching": lambda m: {"pixel_values": m.noise(1, 2, 3, 64, 64)},
    "ViltForImagesAndTextClassification": lambda m: {
        "input_ids": _ids(m, 1, 8),
        "pixel_values": m.noise(1, 2, 3, 64, 64),
    },
    "SpeechT5Model": lambda m: {
        "input_values": m.noise(1, 8, m.config.hidden_size),
        "decoder_input_values": m.noise(1, 4, m.config.hidden_size),
    },
    "TimesFm2_5Model": lambda m: {"past_values": m.noise(1, m.config.context_length)},
    "ClapModel": _clap,
    "BarkFineModel": lambda m: {"codebook_idx": 1, "input_ids": _ids(m, 1, 8, m.config.n_codes_total)},
    "PPOCRV5MobileRecEncoderWithSVTR": _first_map,
    "PPOCRV5ServerRecEncoderWithSVTR": _first_map,
    "PPOCRV6SmallRecEncoderWithSVTR": _first_map,
    "SLANetBackbone": _image_map,
    "SpeechT5ForSpeechToSpeech": lambda m: {
        "input_values": m.noise(1, 2000),
        "decoder_input_values": m.noise(1, 4, m.config.num_mel_bins),
        "speaker_embeddings": m.noise(1, m.config.speaker_embedding_dim),
    },
    "SpeechT5ForTextToSpeech": lambda m: {
        "input_ids": _ids(m, 1, 8),
        "decoder_input_values": m.noise(1, 4, m.config.num_mel_bins),
        "speaker_embeddings": m.noise(1, m.config.speaker_embedding_dim),
    },
    "TimesFmModelForPrediction": lambda m: {
        "past_values": [m.noise(m.config.context_length)],
        "freq": torch.zeros(1, dtype=torch.long),
    },
    "VibeVoiceAcousticTokenizerModel": lambda m: {"input_values": m.noise(1, 1, 6400)},
    "VibeVoiceAcousticTokenizerEncoderModel": lambda m: {"hidden_states": m.noise(1, 1, 6400)},
    "XCLIPVisionModel": lambda m: {"pixel_values": m.noise(m.config.num_frames, 3, *_square(m))},
    "T5ForSequenceClassification": _same_twice,
    "MT5ForSequenceClassification": _same_twice,
    "UMT5ForSequenceClassification": _same_twice,
    "VideoMAEForPreTraining": _masked_video,
    "TimesFmModel": lambda m: {
        "past_values": m.noise(1, m.config.context_length),
        "past_values_padding": torch.zeros(1, m.config.context_length),
        "freq": torch.zeros(1, 1, dtype=torch.long),
    },
    "EfficientLoFTRModel": lambda m: {"pixel_values": m.noise(1, 2, 3, 64, 64)},
    "EfficientLoFTRForKeypointMatching": lambda m: {"pixel_values": m.noise(1, 2, 3, 64, 64)},
    "MiniCPMOcrVisionModel": _targets,
    "MiniCPMV4_6VisionModel": _targets,
    "MiniCPMV4_7VisionModel": _targets,
    "MuseGlimmerVisionModel": _temporal,
    "MuseSparkVisionModel": _temporal,
    "PPOCRV5MobileDetModel": _image_map,
    "PPOCRV5ServerDetModel": _image_map,
    "PPOCRV6MediumDetModel": _image_map,
    "PPOCRV6SmallDetModel": _image_map,
    "DecisionTransformerModel": _decisions,
    "DeepseekOcr2VisionModel": lambda m: {"pixel_values": m.noise(1, 3, 768, 768)},
    "Blip2ForImageTextRetrieval": lambda m: {
        "pixel_values": m.noise(1, 3, *_square(m)),
        "input_ids": _ids(m, 1, 8),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "use_image_text_matching_head": True,
    },
    "GraniteSpeech5Encoder": _stacked,
    "GraniteSpeech5ForCTC": _stacked,
    "Gemma4AudioModel": lambda m: {
        "input_features": m.noise(1, 32, 128),
        "input_features_mask": torch.ones(1, 32, dtype=torch.bool),
    },
    "Gemma3nAudioEncoder": lambda m: {
        "audio_mel": m.noise(1, 32, m.config.input_feat_size),
        "audio_mel_mask": torch.zeros(1, 32, dtype=torch.bool),
    },
    "Dots3NoteAudioModel": lambda m: {
        "input_features": m.noise(1, m.config.feature_size, 64),
        "chunk_sample_lengths": torch.tensor([64 * m.config.hop_length]),
    },
    "Qwen2_5OmniTalkerForConditionalGeneration": lambda m: {
        "inputs_embeds": m.noise(1, 8, m.config.embedding_size),
        "position_ids": torch.arange(8).expand(3, 1, 8),
    },
    "NeuCodecModel": _codec,
    "Xcodec2Model": _codec,
    "LongformerForMultipleChoice": lambda m: {
        "input_ids": _ids_with(m, "sep_token_id", 3)["input_ids"][None].repeat(1, 2, 1)
    },
    "LongformerForQuestionAnswering": lambda m: _ids_with(m, "sep_token_id", 3),
    "SplinterForPreTraining": lambda m: _ids_with(m, "question_token_id", 1),
    "Kimi_K25VisionModel": _grid_of_patches,
    "PaddleOCRVisionModel": _images_in_patches,
    "PaddleOCRVisionTransformer": _images_in_patches,
    "SegGptModel": _pairs,
    "SegGptForImageSegmentation": _pairs,
    "PeVideoEncoder": _frames,
    "PeVideoModel": _frames,
    "Gemma4VisionModel": _positions,
    "Florence2VisionBackbone": lambda m: {"hidden_states": m.noise(1, 3, 64, 64)},
    "Phi4MultimodalAudioModel": lambda m: {
        "hidden_states": m.noise(1, 64, m.config.input_size),
        "mask": torch.ones(1, 64, dtype=torch.bool),
    },
    "SpeechEncoderDecoderModel": lambda m: {"input_values": m.noise(1, 2000), "decoder_input_ids": _ids(m, 1, 4)},
    "InklingAudioModel": lambda m: {"audio_input_ids": m.integers(16, 1, 4, m.config.n_mel_bins)},
    "PI0ForConditionalGeneration": lambda m: {
        "state": m.noise(1, m.config.max_state_dim),
        "input_ids": _ids(m, 1, 8),
    },
    "TvpModel": lambda m: {
        "input_ids": _ids(m, 1, 8),
        "pixel_values": m.noise(1, m.config.num_frames, 3, 448, 448),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
    },
    "TvpForVideoGrounding": lambda m: {
        "input_ids": _ids(m, 1, 8),
        "pixel_values": m.noise(1, m.config.num_frames, 3, 448, 448),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
    },
    "XcodecModel": lambda m: {"input_values": m.noise(1, 1, 3200)},
    "ColQwen2ForRetrieval": lambda m: {
        "input_ids": _ids(m, 1, 8),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
    },
    "ClapAudioModel": _clap,
    "ClapAudioModelWithProjection": _clap,
    "Blip2QFormerModel": _qformer,
    "pix2struct": lambda m: _flattened(m) if "flattened_patches" in m.parameters else None,
    "Kosmos2Model": _kosmos,
    "Kosmos2ForConditionalGeneration": _kosmos,
    "IdeficsModel": _idefics,
    "IdeficsForVisionText2Text": _idefics,
    "perceiver": _perceiver,
    "MimiDecoderModel": lambda m: {"latents": m.noise(1, m.config.hidden_size, 4)},
    "PocketTTSAudioTokenizerDecoderModel": lambda m: {"latents": m.noise(1, m.config.hidden_size, 4)},
    "Qwen2_5OmniToken2WavBigVGANModel": lambda m: {"mel_spectrogram": m.noise(1, m.config.mel_dim, 8)},
    "Molmo2VisionModel": lambda m: {
        "pixel_values": m.noise(1, m.config.num_position_embeddings, 3 * m.config.patch_size**2)
    },
    "SLANeXtBackbone": _map(3, 512, 512),
    "SLANetSLAHead": lambda m: {"hidden_states": m.noise(1, 8, m.config.post_conv_out_channels)},
    "MllamaVisionModel": lambda m: {
        "pixel_values": m.noise(1, 1, m.config.max_num_tiles, 3, m.config.image_size, m.config.image_size),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, m.config.max_num_tiles, dtype=torch.long),
    },
    "TimesFm2_5ModelForPrediction": lambda m: {"past_values": [m.noise(m.config.context_length)]},
}
