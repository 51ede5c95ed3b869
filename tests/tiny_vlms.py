"""Tiny random vision-language models of ten families, their processors, and prompts with pictures; nothing is loaded.

A processor that has a part for videos cannot be made without torchvision, unless that part is left out: `lenient`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tokengrain.vision import Vision

WORDS = ["<unk>", "<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "user", "assistant"]
WORDS += ["what", "is", "this", "a", "b", "c", "d", "e", "f", "g", "red", "blue", "?", "."]
QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
LLAVA = {"image_token": "<image>", "video_token": "<video>"}
IDEFICS = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
IDEFICS |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
INTERN = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
GEMMA = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
SPECIAL = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), QWEN),
    **dict.fromkeys(("llava", "llava_onevision", "llava_next_video"), LLAVA),
    **dict.fromkeys(("smolvlm", "idefics3"), IDEFICS),
    "internvl": {**INTERN, "video_token": "<video>"},
    "gemma3": GEMMA,
}
FAMILIES = tuple(SPECIAL)
SIDE = 8  # of a patch, in pixels
TILES = [[16, 32], [32, 16], [32, 32]]
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.15,
}
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "patch_size": SIDE, "initializer_range": 0.15}
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}
CHAT = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %} <|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@cache
def tokenizer(family: str, words: tuple[str, ...] = ()) -> Any:
    """Words split at spaces, the family's special tokens, and `words`."""
    known = {word: i for i, word in enumerate(dict.fromkeys([*WORDS, *words]))}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    found = PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=SPECIAL[family], **ends)
    if SPECIAL[family] is IDEFICS:
        found.add_tokens([f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)], special_tokens=True)
    return found


def config_of(family: str, **text: Any) -> Any:
    """A config; `text` changes its language model's part."""
    tokens = tokenizer(family)
    of = {name: tokens.convert_tokens_to_ids(token) for name, token in SPECIAL[family].items()}
    text = {**TEXT, "vocab_size": len(tokens), **text}
    image = of.get("image_token", of.get("context_image_token"))
    given: dict[str, Any] = {"text_config": text, "image_token_id": image}
    if SPECIAL[family] is QWEN:
        given |= {f"{name}_id": of[name] for name in ("video_token", "vision_start_token", "vision_end_token")}
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        text["rope_parameters"] = rope
        width = text["hidden_size"]
        more = {"depth": 2, "num_heads": 4, "out_hidden_size": width}
        if family == "qwen2_vl":
            del more["out_hidden_size"]
            more |= {"embed_dim": 32, "hidden_size": width, "mlp_ratio": 2}
        elif family == "qwen2_5_vl":
            more |= {"window_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        else:
            more |= {"depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
            text |= {"head_dim": 8, "rope_parameters": {**rope, "mrope_interleaved": True}}
        given["vision_config"] = {**TOWER, **more}
    elif SPECIAL[family] is LLAVA:
        text["model_type"] = "qwen2" if family == "llava_onevision" else "llama"
        tower = {**TOWER, **LAYERS, "model_type": "clip_vision_model", "image_size": 16, "projection_dim": 32}
        given["vision_config"] = tower
        del given["image_token_id"]
        given["image_token_index"] = image
        if family == "llava":
            given |= {"vision_feature_layer": -1, "image_seq_length": 4}
        else:
            given |= {"image_grid_pinpoints": TILES, "video_token_index": of["video_token"]}
        if family == "llava_onevision":
            tower |= {"model_type": "siglip_vision_model", "vision_use_head": False}
            del tower["projection_dim"]
        if family == "llava_next_video":
            given |= {"vision_feature_layer": -1, "image_seq_length": 4, "video_seq_length": 1}
    elif SPECIAL[family] is IDEFICS:
        text["model_type"] = "llama"
        given |= {"vision_config": {**TOWER, **LAYERS, "image_size": 32}, "scale_factor": 2}
    elif family == "internvl":
        text["model_type"] = "qwen2"
        tower = {**TOWER, **LAYERS, "image_size": [32, 32], "patch_size": [SIDE, SIDE]}
        given |= {"vision_config": tower, "image_seq_length": 4}
    else:
        text = {"head_dim": 8, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], **text}
        tower = {**TOWER, **LAYERS, "model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False}
        given |= {"text_config": text, "vision_config": tower, "mm_tokens_per_image": 4}
        del given["image_token_id"]
        given["image_token_index"] = image
        given |= {"boi_token_index": of["boi_token"], "eoi_token_index": of["eoi_token"]}
    return transformers.AutoConfig.for_model(family, **given)


def tiny_vlm(family: str, *, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **text: Any) -> Any:
    """A random model in evaluation mode, the same every time."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config_of(family, **text))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


def lenient(kind: Any) -> Any:
    """A class of processors that does without its part for videos."""

    class Lenient(kind):
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            missing = name == "video_processor" and argument is None
            return None if missing else super().check_argument_for_proper_class(name, argument)

    Lenient.__name__ = Lenient.__qualname__ = kind.__name__
    return Lenient


@cache
def processor(family: str) -> Any:
    """The family's processor, without videos. (SmolVLM's own wants num2words; Idefics3's is the same for images.)"""
    tokens, t = tokenizer(family), transformers
    pixels = {"size": {"shortest_edge": 256, "longest_edge": 4096}, "patch_size": SIDE}
    crop = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    llava = {"patch_size": SIDE, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    tiles = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    square = {"size": {"height": 32, "width": 32}}
    one = {"size": {"height": 16, "width": 16}, "image_grid_pinpoints": TILES}
    qwen = t.Qwen2VLImageProcessorPil
    parts: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "qwen2_vl": (t.Qwen2VLProcessor, qwen(**pixels), {"chat_template": CHAT}),
        "qwen2_5_vl": (t.Qwen2_5_VLProcessor, qwen(**pixels), {"chat_template": CHAT}),
        "qwen3_vl": (t.Qwen3VLProcessor, qwen(**pixels), {"chat_template": CHAT}),
        "llava": (t.LlavaProcessor, t.CLIPImageProcessorPil(**crop), llava),
        "llava_onevision": (
            t.LlavaOnevisionProcessor,
            t.LlavaOnevisionImageProcessorPil(**one),
            {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        ),
        "llava_next_video": (
            t.LlavaNextVideoProcessor,
            t.LlavaNextImageProcessorPil(**crop, image_grid_pinpoints=TILES),
            llava,
        ),
        "smolvlm": (t.Idefics3Processor, t.SmolVLMImageProcessorPil(**tiles), {"image_seq_len": 4}),
        "idefics3": (t.Idefics3Processor, t.Idefics3ImageProcessorPil(**tiles), {"image_seq_len": 4}),
        "internvl": (
            t.InternVLProcessor,
            t.GotOcr2ImageProcessorPil(**square, crop_to_patches=False),
            {"image_seq_length": 4},
        ),
        "gemma3": (t.Gemma3Processor, t.Gemma3ImageProcessorPil(**square), {"image_seq_length": 4}),
    }
    kind, images, more = parts[family]
    return lenient(kind)(image_processor=images, tokenizer=tokens, **more)


def mark(family: str) -> str:
    """What stands for an image in a prompt's text."""
    if SPECIAL[family] is QWEN:
        return "<|vision_start|><|image_pad|><|vision_end|>"
    names = ("boi_token", "image_token", "context_image_token")
    return next(SPECIAL[family][name] for name in names if name in SPECIAL[family])


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Noise of this height and width."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def prompt(family: str, sizes: Sequence[tuple[int, int]], text: str, seed: int = 0) -> tuple[list[int], Vision]:
    """A prompt's tokens and vision: pictures of these sizes, then a text."""
    pictures = [picture(seed + i, size) for i, size in enumerate(sizes)]
    words = " ".join([*[mark(family)] * len(sizes), text])
    return split(processor(family)(text=[words], images=[pictures], return_tensors="pt"))


def split(out: Any) -> tuple[list[int], Vision]:
    """What a processor gives for one prompt, as its tokens and its vision."""
    types = out.get("mm_token_type_ids", out.get("token_type_ids"))
    text = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
    inputs = {name: value for name, value in out.items() if name not in text}
    return out["input_ids"][0].tolist(), Vision(inputs, types=None if types is None else torch.as_tensor(types)[0])


def video_prompt(family: str, frames: int, text: str, seed: int = 0) -> tuple[list[int], Vision]:
    """A video of noise as tensors in the form of the family's processor, which needs torchvision; then a text."""
    tokens, generator = tokenizer(family), torch.Generator().manual_seed(seed)
    video, after = tokens.convert_tokens_to_ids(SPECIAL[family]["video_token"]), tokens(text)["input_ids"]

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if SPECIAL[family] is not QWEN:
        inputs = {"pixel_values_videos": noise(1, frames, 3, 16, 16)}
        # One token per frame after pooling; LLaVA-OneVision puts a line's end behind all.
        return [video] * (frames + (family == "llava_onevision")) + after, Vision(inputs)
    grid = torch.tensor([[frames // 2, 2, 4]])
    inputs = {"pixel_values_videos": noise(int(grid.prod()), 3 * 2 * SIDE**2), "video_grid_thw": grid}
    start, end = (tokens.convert_tokens_to_ids(QWEN[f"vision_{side}_token"]) for side in ("start", "end"))
    block = [start, *[video] * 2, end]
    if family == "qwen3_vl":  # a block per pair of frames, behind its time
        return [t for i in range(frames // 2) for t in (8 + i, *block)] + after, Vision(inputs)
    if family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([1.0])
    return [start, *[video] * frames, end, *after], Vision(inputs)
