"""Tiny random vision-language models with processors, and pictures drawn for tests.

Nothing is downloaded: tokenizers are those of ``support`` with a few special tokens more, image
processors are those of transformers at a few pixels.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from support import tiny_tokenizer
from tokenizers import Tokenizer

from kedit_lightning import BaseModel

MARKS = {
    "image_token": "<image>",
    "video_token": "<video>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<image>",
    "fake_token": "<fake_token_around_image>",
    "global_token": "<global-img>",
}
TEXT_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SIDE = {"height": 8, "width": 8}
GRID = [[8, 8], [8, 16]]


def tokenizer(**marks: str) -> Any:
    """A copy of the tiny tokenizer with special tokens for pictures."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer(True).backend_tokenizer.to_str()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=marks,
    )


def without_video(processor: str) -> Any:
    """A class of processors that can be made where torchvision, which reads videos, is absent."""

    def check(self: Any, name: str, argument: Any) -> Any:
        if name != "video_processor":
            return super(made, self).check_argument_for_proper_class(name, argument)
        return None

    parent = getattr(transformers, processor)
    made = type(parent.__name__, (parent,), {"check_argument_for_proper_class": check})
    return made


def _llava() -> tuple[Any, Any]:
    tokens = tokenizer(image_token="<image>")
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=SIDE),
        tokens,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=transformers.LlamaConfig(vocab_size=len(tokens), **TEXT_CONFIG),
        image_token_id=processor.image_token_id,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    tokens = tokenizer(image_token="<image>", video_token="<video>")
    processor = without_video("LlavaOnevisionProcessor")(
        transformers.LlavaOnevisionImageProcessorPil(
            size=SIDE, image_grid_pinpoints=[[8, 8], [8, 16]]
        ),
        tokens,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**CLIP),
        text_config=transformers.Qwen2Config(vocab_size=len(tokens), **TEXT_CONFIG),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        video_token_id=tokens.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=GRID,
        vision_feature_layer=-1,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen(kind: str) -> tuple[Any, Any]:
    tokens = tokenizer(image_token="<image>", video_token="<video>")
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=256
    )
    processor = without_video(f"{name}Processor")(images, tokens)
    ids = {f"{n}_token_id": tokens.convert_tokens_to_ids(f"<{n}>") for n in ("image", "video")}
    vision: dict[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**TEXT_CONFIG, "vocab_size": len(tokens), "rope_parameters": rope}
    if kind == "qwen2_vl":
        vision |= {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1}
    else:
        vision |= {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
        vision |= {"out_hidden_size": 32}
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    if kind == "qwen3_vl":
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        text |= {"head_dim": 8}
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text, **ids)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def _gemma3() -> tuple[Any, Any]:
    tokens = tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil(size=SIDE), tokens, image_seq_length=4
    )
    ids = {f"{n}_token_index": tokens.convert_tokens_to_ids(f"<{n}>") for n in ("boi", "eoi")}
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**{**CLIP, "vision_use_head": False}),
        text_config=transformers.Gemma3TextConfig(
            vocab_size=len(tokens), head_dim=8, sliding_window=16, **TEXT_CONFIG
        ),
        mm_tokens_per_image=4,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        **ids,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model, processor


def _paligemma() -> tuple[Any, Any]:
    tokens = tokenizer(image_token="<image>")
    images = transformers.SiglipImageProcessorPil(size=SIDE)
    images.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(images, tokens)
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**{**CLIP, "vision_use_head": False}),
        text_config=transformers.GemmaConfig(vocab_size=len(tokens), head_dim=8, **TEXT_CONFIG),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokens = tokenizer(**{name: MARKS[name] for name in names})
    processor = without_video("InternVLProcessor")(
        transformers.GotOcr2ImageProcessorPil(size=SIDE, crop_to_patches=False),
        tokens,
        image_seq_length=1,
    )
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            **{**CLIP, "image_size": [8, 8], "patch_size": [4, 4]}
        ),
        text_config=transformers.Qwen2Config(vocab_size=len(tokens), **TEXT_CONFIG),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        image_seq_length=1,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def _idefics() -> tuple[Any, Any]:
    tokens = tokenizer(fake_token=MARKS["fake_token"], global_token=MARKS["global_token"])
    edge = {"longest_edge": 16}
    images = transformers.Idefics3ImageProcessorPil(
        do_image_splitting=False, size=edge, max_image_size=edge
    )
    processor = transformers.Idefics3Processor(images, tokens, image_seq_len=4)
    config = transformers.Idefics3Config(
        vision_config=transformers.Idefics3VisionConfig(**{**CLIP, "image_size": 16}),
        text_config=transformers.LlamaConfig(vocab_size=len(tokens), **TEXT_CONFIG),
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _blip2(text: str) -> tuple[Any, Any]:
    tokens = tokenizer()
    processor = transformers.Blip2Processor(
        transformers.BlipImageProcessorPil(size=SIDE), tokens, num_query_tokens=3
    )
    tower = {name: value for name, value in CLIP.items() if name != "image_size"}
    if text == "opt":
        decoder: Any = transformers.OPTConfig(
            vocab_size=len(tokens), ffn_dim=48, word_embed_proj_dim=32, **TEXT_CONFIG
        )
    else:
        decoder = transformers.T5Config(
            vocab_size=len(tokens),
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=3,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(image_size=8, **tower),
        qformer_config=transformers.Blip2QFormerConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            encoder_hidden_size=16,
            vocab_size=len(tokens),
            cross_attention_frequency=1,
        ),
        text_config=decoder,
        num_query_tokens=3,
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    with torch.no_grad():  # so that what the Q-Former reads of a picture counts
        for name, weight in model.qformer.named_parameters():
            if weight.dim() > 1 and "crossattention" in name:
                weight.mul_(20.0)
        model.language_projection.weight.mul_(10.0)
    return model, processor


def _mllama() -> tuple[Any, Any]:
    tokens = tokenizer(image_token="<|image|>", python_token="<|python_tag|>")
    images = transformers.MllamaImageProcessorPil(size=SIDE, max_image_tiles=4)
    processor = transformers.MllamaProcessor(images, tokens)
    text = {**TEXT_CONFIG, "vocab_size": len(tokens), "cross_attention_layers": [1]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "vision_output_dim": 32,
        "image_size": 8,
        "patch_size": 4,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0],
    }
    config = transformers.MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id
    )
    model = transformers.MllamaForConditionalGeneration(config)
    layer = model.model.language_model.layers[1]
    for gate in (layer.cross_attn_attn_gate, layer.cross_attn_mlp_gate):
        torch.nn.init.constant_(gate, 1.0)  # closed at the start
    return model, processor


BUILDERS: dict[str, Any] = {
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": lambda: _qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: _qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: _qwen("qwen3_vl"),
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "internvl": _internvl,
    "idefics3": _idefics,
    "blip2_opt": lambda: _blip2("opt"),
    "blip2_t5": lambda: _blip2("t5"),
    "mllama": _mllama,
}


@cache
def _parts(kind: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = BUILDERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # larger than the usual start, so that answers differ
                parameter.mul_(4.0)
    return model.double(), processor


def vision_base(kind: str, **options: Any) -> BaseModel:
    """The tiny vision-language model of a family; equal calls share one model."""
    model, processor = _parts(kind)
    return BaseModel(model, processor.tokenizer, name=kind, processor=processor, **options)


def vision_folder(folder: Path) -> str:
    """Save the tiny LLaVA with its processor. Gives the folder's path."""
    model, processor = _parts("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def draw(path: Path, seed: int, width: int = 12, height: int = 10) -> str:
    """Draw a picture of random dots; the same for the same seed. Gives its path."""
    dots = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(dots).save(path)
    return str(path)
