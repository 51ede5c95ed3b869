"""Rows with pictures: forms of pictures, their tokens in the text, what is refused, processors without torchvision."""

import base64
import io
import json
import pickle
import sys

import av
import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.tiny_vlms import CHAT, FAMILIES, SPECIAL, mark, picture, processor, split, tiny_vlm, tokenizer
from tokengrain.data import vision
from tokengrain.data.config import RowError, TokenizeConfig, VideoConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.pictures import LARGEST, frames, image
from tokengrain.data.rows import load_rows
from tokengrain.data.vision import load_processor, without_torchvision
from tokengrain.errors import DataError, ModelError, RecipeError
from tokengrain.models import load_reader
from tokengrain.rollout.sampler import encode_prompts
from tokengrain.scoring.vision import placeholders
from tokengrain.specs import ModelSpec
from tokengrain.vision import Vision

QWEN = "qwen2_5_vl"
WITHOUT = pytest.mark.skipif(vision.is_torchvision_available(), reason="is about an environment without torchvision")
PAD = "<|image_pad|>"
ANSWERS = {"chosen": " a b", "rejected": " c"}
SAID = {side: [{"role": "assistant", "content": text}] for side, text in ANSWERS.items()}


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def said(*parts: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": list(parts)}]


def row(*images: object, text: str | None = None, **more: object) -> dict[str, object]:
    prompt = " ".join([*[mark(QWEN)] * len(images), "what is this ?"]) if text is None else text
    return {"prompt": prompt, **ANSWERS, "images": list(images), **more}


def same(one: Vision | None, other: Vision | None) -> bool:
    return one is not None and other is not None and one.fingerprint == other.fingerprint


# ---- Tokens and tensors are those of the whole processor


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_give_what_the_processor_gives(family):
    images, text = [picture(0), picture(1, (32, 48))], f"a {mark(family)} what {mark(family)} is this ?"
    rows = [{"prompt": text, **ANSWERS, "images": images}, {"prompt": "a b c", "chosen": " d", "rejected": " e"}]
    seeing, plain = prepare_pairs(rows, processor(family))
    ids, wanted = split(processor(family)(text=[f"{text} a b"], images=[images], return_tensors="pt"))
    assert seeing.prompt_ids + seeing.completions[0].ids[:-1] == ids
    assert same(seeing.vision, wanted)
    assert wanted.types is None or torch.equal(seeing.vision.types, wanted.types[: len(seeing.prompt_ids)])
    assert seeing.vision.patches > 0
    assert plain.vision is None
    item, other = encode_prompts(rows, processor(family))
    assert item.ids == seeing.prompt_ids
    assert same(item.vision, seeing.vision)
    assert other.vision is None


def test_every_form_of_an_image_gives_the_same(tmp_path):
    image = picture(3, (32, 48))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(png(image))
    url = "data:image/png;base64," + base64.b64encode(png(image)).decode()
    path, array = "pictures/one.png", np.asarray(image)
    forms = [image, png(image), {"bytes": png(image), "path": None}, url, array, array.tolist(), str(tmp_path / path)]
    file = tmp_path / "rows.jsonl"
    lines = [row(path), row({"bytes": None, "path": path}), row(array.tolist()), row(url)]
    lines += [{"prompt": lines[0]["prompt"], **ANSWERS, "image": path}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [*prepare_pairs([row(form) for form in forms], processor(QWEN)), *prepare_pairs(file, processor(QWEN))]
    assert len(samples) == 12
    assert all(same(sample.vision, samples[0].vision) for sample in samples)


def test_parts_of_messages_and_columns_fill_the_same_places():
    one, two = picture(1), picture(2)
    text = {"type": "text", "text": "what is this ?"}
    inside = said({"type": "image", "image": one}, {"type": "image", "image": two}, text)
    data_url = "data:image/png;base64," + base64.b64encode(png(one)).decode()
    openai = said({"type": "image_url", "image_url": {"url": data_url}}, {"type": "image", "image": two}, text)
    rows = [
        {"prompt": inside, "images": None},
        {"prompt": openai, "images": []},
        {"prompt": said({"type": "image"}, {"type": "image"}, text), "images": [one, two]},
        {"prompt": said({"type": "image", "image": one}, {"type": "image"}, text), "images": [two]},
        {"prompt": [{"role": "user", "content": "what is this ?"}], "images": [one, two]},
    ]
    samples = list(prepare_pairs([{**r, **SAID} for r in rows], processor(QWEN)))
    # Prompts within both conversations, and single conversations.
    samples += prepare_pairs([{side: [*inside, *SAID[side]] for side in SAID}], processor(QWEN))
    samples += prepare_sft([{"messages": [*inside, *SAID["chosen"]]}], processor(QWEN))
    assert len({tuple(sample.prompt_ids) for sample in samples}) == 1
    assert all(same(sample.vision, samples[0].vision) for sample in samples)
    chat = prepare_pairs([row(one, two, text="what is this ?")], processor(QWEN), TokenizeConfig(chat=True))
    assert same(chat[0].vision, samples[0].vision)


def test_spans_and_token_rewards_are_about_the_text_behind_the_pictures():
    config = TokenizeConfig(spans="diff")
    rewards = {"chosen_token_rewards": [{"start": 3, "end": 4, "reward": 2.0}], "rejected_token_rewards": []}
    texts = {"chosen": " a b", "rejected": " a c"}
    seeing, blind = (
        prepare_pairs([{"prompt": prompt, **texts, **rewards, "images": images}], processor(QWEN), config)[0]
        for prompt, images in ((f"{mark(QWEN)} what", [picture(0, (64, 64))]), ("what", []))
    )
    assert len(seeing.prompt_ids) == len(blind.prompt_ids) + 18
    assert [c.columns for c in seeing.completions] == [c.columns for c in blind.completions]
    assert seeing.completions[0].columns["token_rewards"] == [0.0, 2.0, 0.0]
    assert seeing.completions[0].columns["spans"][1] == 1


# ---- Cutting


@pytest.mark.parametrize("side", ["left", "right"])
def test_pictures_are_never_cut(side):
    text = f"a b c {mark(QWEN)} d e f"
    whole = prepare_pairs([row(picture(0), text=text)], processor(QWEN))[0].prompt_ids
    start = processor(QWEN).tokenizer.convert_tokens_to_ids("<|vision_start|>")
    first, last = whole.index(start), len(whole) - 4
    for limit in range(1, len(whole)):
        config = TokenizeConfig(max_prompt_length=limit, truncation_side=side)
        fits = limit >= (len(whole) - first if side == "left" else last + 1)
        if not fits:
            for prepare in (prepare_pairs, encode_prompts):
                with pytest.raises(DataError, match=r"row 0: .*'prompt': the prompt is cut within its pictures; got"):
                    prepare([row(picture(0), text=text)], processor(QWEN), config)
            continue
        kept = prepare_pairs([row(picture(0), text=text)], processor(QWEN), config)[0]
        assert kept.prompt_ids == (whole[-limit:] if side == "left" else whole[:limit])
        assert len(kept.vision.types) == limit
        assert int(kept.vision.types.sum()) == 4


# ---- What is refused, with file, row, field, value and expectation


def jpeg_without_its_end() -> bytes:
    content = io.BytesIO()
    picture(0, (64, 64)).save(content, "JPEG")
    return content.getvalue()[:-200]


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 4 thousand million pixels."""
    made = bytearray(png(picture(0)))
    made[16:24] = (65_000).to_bytes(4, "big") * 2
    import zlib

    made[29:33] = zlib.crc32(bytes(made[12:29])).to_bytes(4, "big")
    return bytes(made)


TWO = f"{mark(QWEN)} {mark(QWEN)} what"
CALLED = [{"role": "user", "content": "what is this ?"}, {"role": "assistant", "content": "a"}]
REFUSED = {
    "too few": (row(picture(0), text=TWO), r"'images': the prompt has 2 places for images; got '1 in the row'; exp"),
    "too many": (
        row(picture(0), picture(1), text=mark(QWEN)),
        r"'images': the prompt has 1 places for images; got '2 in",
    ),
    "none": (row(text=TWO), r"'prompt': the prompt has 2 places for images; got '0 in the row'"),
    "no place": (row(picture(0), text="what"), r"'images': the prompt has 0 places .* written as '<\|image_pad\|>'"),
    "places": (
        {"prompt": said({"type": "image"}, {"type": "image"}), **SAID, "images": [picture(0)]},
        r"'images': the messages have 2 places for images; got 1; expected as many",
    ),
    "two columns": (
        {"prompt": said({"type": "image"}), **SAID, "images": [picture(0)], "image": picture(1)},
        r"'image': stands beside images; got .*; expected one of the two",
    ),
    "typed": (
        {"prompt": said({"type": "image", "image": picture(0)}, f"what {PAD}"), **SAID},
        r"'prompt': has '<\|image_pad\|>', which stands for a picture; got 'what <\|image_pad\|>'; expected text",
    ),
    "typed in a completion": (row(picture(0), chosen=f" a {PAD}"), r"'chosen': has '<\|image_pad\|>', which stands"),
    "token of a completion": (row(picture(0), chosen=[8, 22], rejected=[9]), r"'chosen': has a token that stands"),
    "picture in a completion": (
        {
            "prompt": said({"type": "image", "image": picture(0)}),
            "chosen": [{"role": "assistant", "content": [{"type": "image", "image": picture(0)}]}],
            "rejected": [{"role": "assistant", "content": "a"}],
        },
        r"'chosen': a completion has a picture; got .*; expected pictures in the prompt only",
    ),
    "picture of a tool": (
        {"prompt": [*CALLED, {"role": "tool", "content": [{"type": "image", "image": picture(0)}]}], **SAID},
        r"'prompt': a message of the role 'tool' has a picture; got .*; expected pictures in the user's messages, and",
    ),
    "place of a tool": (
        {"prompt": [*CALLED, {"from": "observation", "value": [{"type": "image"}]}], **SAID, "images": [picture(0)]},
        r"'prompt': a message of the role 'tool' has a picture; got .*; expected pictures in the user's messages, and",
    ),
    "picture of a tool in a completion": (
        {
            "prompt": "what",
            "chosen": [*CALLED[1:], {"role": "tool", "content": [{"type": "image"}]}, *SAID["chosen"]],
            "rejected": SAID["rejected"],
        },
        r"'chosen': a completion has a picture; got .*; expected pictures in the prompt only",
    ),
    "no file": (row("nowhere.png"), r"'images': image 0: there is no such file; got '.*nowhere.png'; expected"),
    "no image": (row(b"text"), r"'images': image 0: a picture of 4 bytes is no image: PNG, JPEG, .* are read"),
    "damaged": (row(jpeg_without_its_end()), r"'images': image 0: a picture of \d+ bytes is damaged"),
    "bomb": (row(bomb()), r"'images': image 0: a picture of \d+ bytes is too large"),
    "network": (
        row("https://example.org/a.png"),
        r"'images': image 0: is not fetched from the network; got 'https://exa",
    ),
    "number": (row(3), r"'images': image 0: is of type int; got 3; expected a PIL image, bytes, a path"),
    "null": (row(None), r"'images': holds null; got \[None\]; expected images, or an empty list"),
    "no list": (row(text=mark(QWEN), images="a.png"), r"'images': is of type str; got 'a.png'; expected a list"),
    "grey": (
        row(np.zeros((8, 8), np.uint8)),
        r"'images': is no image; got 'array 8x8 of uint8'; expected .*width",
    ),
    "floats": (row(np.zeros((8, 8, 3))), r"'images': is no image; got 'array 8x8x3 of float64'"),
    "thin": (row(picture(0, (2, 1000))), r"'images': Qwen2_5_VLProcessor cannot take the pictures .*; got '1000x2'"),
    "frames": (
        row(text="<|video_pad|>", videos=[[picture(0), picture(1, (32, 48))]]),
        r"'videos': video 0: the frames of a video are of several sizes; got '32x32, 48x32'",
    ),
    "no frames": (row(text="<|video_pad|>", videos=[[]]), r"'videos': video 0: the video has no frames"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pictures_that_do_not_fit_are_refused(name):
    bad, message = REFUSED[name]
    good = row(picture(0))
    with pytest.raises(DataError, match=rf"^list of rows: row 1: field {message}"):
        prepare_pairs([good, bad], processor(QWEN), TokenizeConfig(chat=False))
    kept = prepare_pairs([good, bad], processor(QWEN), TokenizeConfig(on_invalid="skip"))
    assert (len(kept), sum(kept.report.skipped.values())) == (1, 1)
    if "completion" not in name:
        with pytest.raises(DataError, match=rf"^rows.jsonl: row 1: field {message}"):
            encode_prompts([good, bad], processor(QWEN), file="rows.jsonl")


@pytest.mark.parametrize("family", FAMILIES)
def test_small_and_thin_images_are_read_or_refused(family):
    """As each processor does it: none fails in another way, or loses the image."""
    tokens = set(placeholders(tiny_vlm(family).config))
    for size in ((1, 1), (1, 40), (40, 1), (2, 1000)):
        rows = [row(picture(0, size), text=f"{mark(family)} what")]
        if SPECIAL[family] is SPECIAL[QWEN] and size == (2, 1000):
            with pytest.raises(
                DataError, match=r"row 0: field 'images': \w+ cannot take the pictures .*; got '1000x2'"
            ):
                prepare_pairs(rows, processor(family))
            continue
        (made,) = prepare_pairs(rows, processor(family))
        assert made.vision.patches > 0
        assert tokens & set(made.prompt_ids)


def test_the_largest_image_is_below_what_pillow_refuses():
    assert 2 * (Image.MAX_IMAGE_PIXELS or LARGEST) >= LARGEST


def test_pictures_need_a_processor_that_takes_them():
    what = "the row has pictures, and TokenizersBackend reads text alone; got '1 in the row'; expected the processor"
    with pytest.raises(DataError, match=f"row 0: field 'images': {what}"):
        prepare_pairs([row(picture(0))], tokenizer(QWEN))
    with_template = TokenizeConfig(chat_template=CHAT)
    with pytest.raises(DataError, match="row 0: field 'prompt': the row has pictures"):
        encode_prompts([{"prompt": said({"type": "image", "image": picture(0)})}], tokenizer(QWEN), with_template)
    with pytest.raises(DataError, match=r"field 'videos': the prompt has 0 places .*: Gemma3Processor takes no videos"):
        encode_prompts([{"prompt": "what", "videos": [[picture(0)]]}], processor("gemma3"))


def test_pillow_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModelError, match=r"rows with pictures need Pillow: pip install 'tokengrain\[vision\]'"):
        encode_prompts([row(b"")], tokenizer(QWEN))


# ---- Settings


def test_sizes_bound_images_and_count_in_the_fingerprint():
    rows = [row(picture(0, (64, 64)))]
    lengths, marks = [], set()
    for setting in (None, {"max_pixels": 1024}, {"min_pixels": 16384, "max_pixels": 16384}):
        made = prepare_pairs(rows, processor(QWEN), TokenizeConfig(image=setting))
        lengths.append(int(made[0].vision.types.sum()))
        marks |= {made.fingerprint}
    assert lengths == [16, 4, 64]
    assert len(marks) == 3
    # A processor with a size of its own is given smaller images.
    text = f"{mark('llava')} what"
    plain, small = (
        prepare_pairs([row(picture(0, (64, 64)), text=text)], processor("llava"), TokenizeConfig(image=setting))[0]
        for setting in (None, {"max_pixels": 64})
    )
    assert small.prompt_ids == plain.prompt_ids
    assert not same(small.vision, plain.vision)


def test_settings_without_effect_are_errors(tmp_path):
    config = TokenizeConfig(image={"max_pixels": 1024})
    with pytest.raises(RecipeError, match="image is set, and TokenizersBackend reads text alone; expected a"):
        prepare_pairs([row(text="what")], tokenizer(QWEN), config)
    for prepare in (prepare_pairs, encode_prompts):
        with pytest.raises(RecipeError, match="image is set, and no row has a picture of that kind; drop it"):
            prepare([row(text="what")], processor(QWEN), config)
    for bad in ({"max_pixels": 0}, {"pixels": 3}, {}, 3, {"min_pixels": 9, "max_pixels": 3}):
        with pytest.raises(RecipeError, match=r"^image"):
            TokenizeConfig(image=bad)
    (tmp_path / "a.png").write_bytes(png(picture(0)))
    made = prepare_pairs([row("a.png")], processor(QWEN), TokenizeConfig(image={"folder": str(tmp_path)}))
    assert same(made[0].vision, prepare_pairs([row(picture(0))], processor(QWEN))[0].vision)


# ---- Many pictures


def test_pictures_beyond_memory_are_read_again(monkeypatch, tmp_path):
    rows, made_once = [row(picture(i)) for i in range(4)], made_by_hand(QWEN)
    kept = prepare_pairs(rows, made_once)
    assert kept[1].vision is kept[1].vision
    monkeypatch.setattr(vision, "ROOM", 30_000)
    made, items = prepare_pairs(rows, made_once), encode_prompts(rows, made_once)
    assert made.fingerprint == kept.fingerprint
    copied = pickle.loads(pickle.dumps([item.vision for item in items]))  # as for the workers of a data loader
    for number, sample in enumerate(made):
        assert type(sample.vision.inputs) is dict
        assert same(sample.vision, kept[number].vision)
        assert same(Vision(dict(copied[number].inputs)), sample.vision)
        assert all(torch.equal(items[number].vision.inputs[n], v) for n, v in sample.vision.inputs.items())
    path = tmp_path / "a.png"
    path.write_bytes(png(picture(0)))
    monkeypatch.setattr(vision, "ROOM", 0)
    changing = prepare_pairs([row(str(path))], processor(QWEN))
    path.write_bytes(png(picture(9)))
    with pytest.raises(DataError, match="a picture has changed since the rows were read"):
        changing[0]


def test_rows_of_datasets_keep_their_bytes():
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "chosen": datasets.Value("string"), "rejected": datasets.Value("string")}
        | {"images": datasets.List(datasets.Image())}
    )
    listed = [row(picture(0)), row(picture(1), picture(2))]
    rows = load_rows(datasets.Dataset.from_list(listed, features=features))
    assert set(dict(rows)[0]["images"][0]) == {"bytes", "path"}
    assert prepare_pairs(rows, processor(QWEN)).fingerprint == prepare_pairs(listed, processor(QWEN)).fingerprint
    again = load_rows(datasets.Dataset.from_list([row(picture(0)), row(picture(1), picture(2))], features=features))
    assert again.fingerprint == rows.fingerprint
    assert load_rows(listed).fingerprint == load_rows([row(picture(0)), row(picture(1), picture(2))]).fingerprint
    assert load_rows([row(np.asarray(picture(0)))]).fingerprint != load_rows([row(np.asarray(picture(1)))]).fingerprint


# ---- Processors without torchvision


def made_by_hand(family: str) -> object:
    whole = processor(family)
    own = {name: getattr(whole, name) for name in ("image_processor", "tokenizer", "chat_template")}
    return without_torchvision(type(whole).__mro__[1], **own)


@WITHOUT
def test_a_folder_without_torchvision_gives_the_same_again(tmp_path):
    made = made_by_hand(QWEN)
    made.save_pretrained(tmp_path)
    tiny_vlm(QWEN).config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["video_processor"]["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert saved["video_processor"]["patch_size"] == saved["image_processor"]["patch_size"]
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    loaded = load_processor(config, str(tmp_path))
    assert loaded.chat_template == CHAT
    one, two = (prepare_pairs([row(picture(0), picture(1, (48, 32)))], p) for p in (made, loaded))
    assert one.fingerprint == two.fingerprint
    assert load_processor(transformers.LlamaConfig(), str(tmp_path)) is None


def test_frames_are_the_patches_of_videos():
    clip = [picture(i) for i in range(5)]
    rows = [row(text="<|vision_start|><|video_pad|><|vision_end|> what", videos=[clip])]
    made = made_by_hand(QWEN)
    sample = prepare_pairs(rows, made)[0]
    inputs = sample.vision.inputs
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 4]]
    assert sample.vision.types.tolist().count(2) == 12
    # The first patch in time holds the first two frames, each as it is in its image's patches.
    stills = [made.image_processor(images=[image], return_tensors="pt")["pixel_values"] for image in clip[:2]]
    first = inputs["pixel_values_videos"][:16].view(16, 3, 2, 64)
    for number, still in enumerate(stills):
        assert torch.equal(first[:, :, number], still.view(16, 3, 2, 64)[:, :, 0])
    array = np.stack([np.asarray(image) for image in clip])
    assert same(prepare_pairs([{**rows[0], "videos": [array]}], made)[0].vision, sample.vision)
    few = prepare_pairs(rows, made, TokenizeConfig(video={"frames": 2, "max_pixels": 300, "fps": 2.0}))[0]
    assert few.vision.inputs["video_grid_thw"].tolist() == [[1, 2, 2]]
    with pytest.raises(ModelError, match="videos of this model need torchvision; expected it installed, or the frames"):
        prepare_pairs([{**rows[0], "prompt": "<video>"}], made_by_hand("llava_onevision"))


def test_frames_are_evenly_spaced():
    found, about = frames([picture(i) for i in range(100)], None, None)
    assert len(found) == 32
    assert about["frames_indices"][0] == 0
    assert about["frames_indices"][-1] == 99
    assert about["total_num_frames"] == 100
    assert np.ptp(np.diff(about["frames_indices"])) <= 1


COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200)]
FILM = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture
def clip(tmp_path):
    """A file of six frames, one colour each."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for colour in COLOURS:
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32), colour))))
        container.mux(stream.encode(None))
    return path


def test_a_file_of_a_video_is_decoded(clip):
    found, about = frames(str(clip), None, None)
    assert [len(found), about["fps"], about["total_num_frames"]] == [6, 8.0, 6]
    few, about = frames(clip.read_bytes(), None, VideoConfig(frames=3))
    assert about["frames_indices"] == [0, 2, 5]
    for read, colours in ((found, COLOURS), (few, [COLOURS[i] for i in (0, 2, 5)])):
        means = np.array([np.asarray(frame).mean((0, 1)) for frame in read])
        assert np.abs(means - colours).max() < 12
    made = made_by_hand(QWEN)
    one, two = prepare_pairs([row(text=FILM, videos=[video]) for video in (str(clip), found)], made)
    assert one.vision.inputs["video_grid_thw"].tolist() == [[3, 4, 4]]
    assert torch.equal(one.vision.inputs["pixel_values_videos"], two.vision.inputs["pixel_values_videos"])


def test_what_would_be_cut_off_is_an_error(clip, monkeypatch):
    """PIL turns grey beyond 8 bits into white; only so many frames of a video are looked through."""
    for values in (np.full((4, 4), 256, np.uint16), np.full((4, 4), -1, np.int32), np.ones((4, 4), np.float32)):
        with pytest.raises(RowError, match=r"has other values than a picture; got .*expected 8 bits per channel"):
            image(Image.fromarray(values))
    assert np.asarray(image(Image.fromarray(np.full((4, 4), 200, np.uint16)))).tolist() == [[[200] * 3] * 4] * 4
    monkeypatch.setattr("tokengrain.data.pictures.MOST_FRAMES", 6)
    with pytest.raises(RowError, match=r"clip.mp4 is too long; got .6 frames or more.; expected fewer than 6 frames"):
        frames(str(clip), None, None)


@pytest.mark.parametrize("content", [lambda whole: whole[:200], lambda whole: b"no video" * 9, lambda whole: b""])
def test_a_file_that_is_no_video(clip, content):
    clip.write_bytes(content(clip.read_bytes()))
    with pytest.raises(DataError, match=r"row 0: field 'videos': video 0: .*clip.mp4 is no video, or damaged"):
        prepare_pairs([row(text=FILM, videos=[str(clip)])], made_by_hand(QWEN))


@WITHOUT
def test_what_is_missing_is_said_by_name(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModelError, match=r"files of videos need PyAV: pip install 'tokengrain\[video\]'"):
        prepare_pairs([row(text=FILM, videos=[str(clip)])], made_by_hand(QWEN))
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    tiny_vlm("smolvlm").config.save_pretrained(tmp_path)
    processor("smolvlm").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no processor could be loaded from .*num2words.*pip install num2words"):
        load_reader(ModelSpec(path=str(tmp_path)), str(tmp_path))
