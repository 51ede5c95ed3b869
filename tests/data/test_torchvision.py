"""Videos of seven families by transformers' own processors, and folders with them: `make test-torchvision`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t

from tests.data.test_vision import ANSWERS, mark, row, same
from tests.scoring.test_vision import check
from tests.tiny_vlms import QWEN, SIDE, SPECIAL, picture, processor, split, tiny_vlm
from tokengrain.data import vision
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.data.vision import load_processor, without_torchvision

pytestmark = pytest.mark.torchvision
QWENS = {"size": {"shortest_edge": 256, "longest_edge": 4096}, "patch_size": SIDE}
SQUARE = {"size": {"height": 16, "width": 16}}
VIDEOS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLVideoProcessor", QWENS),
    "qwen2_5_vl": ("Qwen2VLVideoProcessor", QWENS),
    "qwen3_vl": ("Qwen3VLVideoProcessor", QWENS),
    "llava_onevision": ("LlavaOnevisionVideoProcessor", SQUARE),
    "llava_next_video": (
        "LlavaNextVideoVideoProcessor",
        {"size": {"shortest_edge": 16}, "crop_size": SQUARE["size"]},
    ),
    "smolvlm": (
        "SmolVLMVideoProcessor",
        {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
    ),
    "internvl": ("InternVLVideoProcessor", {"size": {"height": 32, "width": 32}}),
}
OWN = ("image_seq_len", "image_seq_length", "num_image_tokens", "patch_size", "vision_feature_select_strategy")


def whole(family: str) -> Any:
    """The family's processor with a part for videos."""
    images, (name, settings) = processor(family), VIDEOS[family]
    kind = t.SmolVLMProcessor if family == "smolvlm" else type(images).__mro__[1]  # whose own needs num2words
    more = {name: getattr(images, name) for name in (*OWN, "num_additional_image_tokens") if hasattr(images, name)}
    parts = {"image_processor": images.image_processor, "tokenizer": images.tokenizer}
    return kind(**parts, video_processor=getattr(t, name)(**settings), chat_template=images.chat_template, **more)


def films(family: str, count: int = 4) -> dict[str, Any]:
    place = "<|vision_start|><|video_pad|><|vision_end|>" if SPECIAL[family] is QWEN else whole(family).video_token
    return row(text=f"{place} what is this ?", videos=[[picture(i) for i in range(count)]])


@pytest.mark.parametrize("family", VIDEOS)
def test_videos(family: str) -> None:
    """Rows give what the processor gives, and shared rows what the model's own forward does."""
    made, rows = whole(family), [films(family), films(family, 6), row(picture(9), text=f"{mark(family)} what")]
    samples = list(prepare_pairs(rows, made, TokenizeConfig(video={"frames": 6, "fps": 2.0})))
    about = {"total_num_frames": 4, "fps": 2.0, "frames_indices": list(range(4))}
    given = {"videos": [np.stack([np.asarray(picture(i)) for i in range(4)])]}
    given["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": [about]}
    ids, wanted = split(made(text=[rows[0]["prompt"]], **given, return_tensors="pt"))
    assert samples[0].prompt_ids == ids
    assert same(samples[0].vision, wanted)
    check(tiny_vlm(family), samples)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_frames_read_as_images_are_the_processors_videos(family: str) -> None:
    made = whole(family)
    parts = {"image_processor": made.image_processor, "tokenizer": made.tokenizer}
    frames = without_torchvision(type(made), **parts, chat_template=made.chat_template)
    for count in (4, 5):
        ours, theirs = (prepare_pairs([films(family, count)], p)[0] for p in (frames, made))
        assert ours.prompt_ids == theirs.prompt_ids
        assert ours.vision is not None
        assert theirs.vision is not None
        assert ours.vision.inputs.keys() == theirs.vision.inputs.keys()
        for name, value in theirs.vision.inputs.items():
            torch.testing.assert_close(ours.vision.inputs[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "internvl"])
def test_folders_of_both_kinds(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved with torchvision and read without it, and the other way round: the same tokens, nearly the same pixels."""
    made = whole(family)
    rows = [{"prompt": f"{mark(family)} what", **ANSWERS, "images": [picture(0)]}]
    tiny_vlm(family).config.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    config = t.AutoConfig.from_pretrained(tmp_path)
    here = load_processor(config, str(tmp_path))
    assert type(here) is type(made)
    with monkeypatch.context() as patch:
        patch.setattr(vision, "is_torchvision_available", lambda: False)
        there = load_processor(config, str(tmp_path))
    assert isinstance(there.video_processor, vision.Frames)
    one, two = (prepare_pairs(rows, p)[0] for p in (here, there))
    assert one.prompt_ids == two.prompt_ids
    again = tmp_path / "again"
    there.save_pretrained(again)
    config.save_pretrained(again)
    back = t.AutoProcessor.from_pretrained(again)
    assert type(back) is type(made)
    assert type(back.video_processor) is type(made.video_processor)
    three = prepare_pairs(rows, back)[0]
    assert three.prompt_ids == one.prompt_ids
    for name, value in one.vision.inputs.items():
        for other in (two, three):
            torch.testing.assert_close(other.vision.inputs[name], value, rtol=0, atol=0.1)
