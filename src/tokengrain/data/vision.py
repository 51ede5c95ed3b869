"""A row's pictures and a model's processor -> the text with the pictures' tokens, and what the model sees.

A processor writes a picture's tokens in the place of one placeholder. That is done here on the rendered text, before it
is tokenised, so that boundaries, spans and token rewards are about characters of the text that the model is given.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PROCESSOR_MAPPING,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.utils import PushToHubMixin, cached_file, is_torchvision_available
from transformers.video_utils import VideoMetadata

from tokengrain.data.config import RowError, TokenizeConfig, check
from tokengrain.data.formats import Example, Given, common_length, text_of
from tokengrain.data.pictures import KINDS, bounded, frames, image, pillow
from tokengrain.data.tokens import text_tokenizer
from tokengrain.errors import DataError, ModelError, RecipeError, read_json, require
from tokengrain.vision import Vision, picture_places

ROOM = 1 << 29  # bytes of tensors that a data set keeps; pictures beyond are read again whenever they are needed
OF_TEXT = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "text_replacement_offsets"}
NEVER_CUT = "tokens of pictures are never cut: raise max_prompt_length, or make pictures smaller with image.max_pixels"


class PictureReader:
    """Reads the pictures of prompts with a processor of transformers, as `config` says; a tokenizer knows none.

    `ids` are the placeholder tokens: no prompt has one without a picture, and no completion any.
    """

    def __init__(self, processor: Any, config: TokenizeConfig) -> None:
        self.processor, self.config, self.tokenizer = processor, config, text_tokenizer(processor)
        self.sees = processor is not self.tokenizer
        self.name = type(processor).__name__
        self.unused = {kind for kind in KINDS if getattr(config, kind) is not None}
        for kind in self.unused:
            what = f"{kind} is set, and {self.name} reads text alone; expected a model that sees, or no {kind}"
            require(self.sees, RecipeError, what)
        named = {kind: getattr(processor, f"{kind}_token", None) for kind in KINDS} if self.sees else {}
        self.marks = {kind: token for kind, token in named.items() if token}
        found = [i for kind in self.marks for i in getattr(processor, f"{kind}_token_ids", ())]
        self.ids = frozenset(i for i in found if i is not None)
        written = self.tokenizer.convert_ids_to_tokens(sorted(self.ids)) if self.ids else []
        self.reserved = sorted({*self.marks.values(), *written})
        self.places = re.compile("|".join(f"(?P<{k}>{re.escape(mark)})" for k, mark in self.marks.items()) or "(?!)")

    def __call__(self, example: Example, prompt: str, file: object = None) -> View | None:
        """The pictures of a row, whose prompt was rendered as `prompt`; None: it has none.

        `file` is where the row comes from. Raises `RowError` where pictures and places in the text differ.
        """
        given = next(iter(example.pictures.values()), None)
        if given is None and not self.sees:
            return None
        if given is not None:
            pillow()
        what = f"the row has pictures, and {self.name} reads text alone"
        expected = "the processor of a model that sees (AutoProcessor), or rows of text"
        fits = self.sees or given is None
        check(fits, "pictures", what, **({} if given is None else self._counted(given)), expected=expected)
        for message in example.messages:
            self._check_text(text_of(message), "prompt")
        kinds = [str(match.lastgroup) for match in self.places.finditer(prompt)]
        for kind in KINDS:
            own, places = example.pictures.get(kind, Given("prompt", [])), kinds.count(kind)
            mark = repr(self.marks[kind]) if kind in self.marks else f"none: {self.name} takes no {kind}s"
            if own.sources and example.prompt and not isinstance(example.prompt, (str, list)):
                places = len(own.sources)  # token ids hold them already, which is checked by their number
                kinds += [kind] * places
            what, expected = f"the prompt has {places} places for {kind}s", f"one for each, written as {mark}"
            fits = places == len(own.sources) and (not places or kind in self.marks)
            check(fits, "pictures", what, **self._counted(own), expected=expected)
        self.unused -= set(kinds)
        return View(self, kinds, example.pictures, folder_of(file, self.config)) if kinds else None

    @staticmethod
    def _counted(given: Given) -> dict[str, Any]:
        return {"field": given.column, "value": f"{len(given.sources)} in the row"}

    def check_completion(self, text: str, ids: Sequence[int] | None, field: str) -> None:
        """Raises `RowError` if a completion holds a placeholder, as text or as a token."""
        self._check_text(text, field)
        held = self.ids.intersection(ids or ())
        what, expected = "has a token that stands for a picture", "tokens of text"
        check(not held, "placeholder", what, field=field, value=sorted(held), expected=expected)

    def _check_text(self, text: str, field: str) -> None:
        found = next((mark for mark in self.reserved if mark in text), None)
        what, expected = f"has {found!r}, which stands for a picture", "text, and pictures in places of their own"
        check(found is None, "placeholder", what, field=field, value=text, expected=expected)

    def check_whole(self, ids: list[int], kept: list[int], view: View | None, field: str = "prompt") -> None:
        """Raises `RowError` unless a prompt's tokens hold all of its pictures, also once they are cut to `kept`."""
        found, wanted = sum(i in self.ids for i in ids), view.tokens if view is not None else 0
        what, expected = "the prompt's tokens do not fit its pictures", f"{wanted} placeholder tokens"
        check(found == wanted, "pictures", what, field=field, value=f"{found} placeholder tokens", expected=expected)
        if not wanted or len(kept) == len(ids):
            return
        start = common_length(kept, ids)
        gone = range(start, start + len(ids) - len(kept))
        what, value = "the prompt is cut within its pictures", f"{len(ids)} tokens, {wanted} of them of pictures"
        needed = picture_places(ids, self.ids, self.tokenizer)
        check(needed.isdisjoint(gone), "pictures", what, field=field, value=value, expected=NEVER_CUT)

    def check_used(self) -> None:
        """Raises `RecipeError` for settings of pictures that no row has. Called once all rows are read."""
        for kind in sorted(self.unused):
            raise RecipeError(f"{kind} is set, and no row has a picture of that kind; drop it")


class View:
    """The pictures of one prompt as its model sees them: `texts` stand in their places in the prompt.

    `tokens` are the placeholders, one per feature that the model computes of the pictures.
    """

    def __init__(
        self, reader: PictureReader, kinds: Sequence[str], pictures: Mapping[str, Given], folder: Path
    ) -> None:
        self.reader, self.kinds, self.pictures, self.folder = reader, kinds, pictures, folder
        self.source = reader, kinds, pictures, folder  # without tensors
        made = self._processed()
        self.texts = [place["replacement"] for place in made["text_replacement_offsets"][0]]
        self.tokens = sum(i in reader.ids for i in made["input_ids"][0].tolist())
        told = bool({"mm_token_type_ids", "token_type_ids"} & made.keys())  # all that transformers 5.21 says of it
        self.typed = getattr(reader.processor, "return_mm_token_type_ids", told)
        self.inputs = {name: v for name, v in made.items() if name not in OF_TEXT and isinstance(v, Tensor)}

    def _processed(self) -> Any:
        """What the processor makes of the pictures alone."""
        reader, settings = self.reader, self.reader.config
        images = self._each("image", lambda source: self._image(source))
        videos = self._each("video", lambda source: frames(source, self.folder, settings.video))
        given: dict[str, Any] = {"images": [images]} if images else {}
        if videos:
            given["videos"] = [np.stack([np.asarray(frame) for frame in found]) for found, _ in videos]
            given["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": [about for _, about in videos]}
        if images and settings.image is not None and _bounds_itself(reader.processor):
            size, own = reader.processor.image_processor.size, settings.image
            least, most = own.min_pixels or size["shortest_edge"], own.max_pixels or size["longest_edge"]
            given["images_kwargs"] = {"size": {"shortest_edge": min(least, most), "longest_edge": max(least, most)}}
        text = " ".join(reader.marks[kind] for kind in self.kinds)
        try:
            return reader.processor(text=[text], **given, return_tensors="pt", return_text_replacement_offsets=True)
        except ModelError:
            raise
        except Exception as error:  # processors raise what they like
            what = f"{reader.name} cannot take the pictures ({type(error).__name__}: {error})"
            sizes = ", ".join(f"{found.width}x{found.height}" for found in images)
            details = {"field": self.pictures[self.kinds[0]].column, "value": sizes or f"{len(videos)} videos"}
            raise RowError("pictures", what, **details, expected="pictures that the model's processor takes") from error

    def _each(self, kind: str, read: Callable[[Any], Any]) -> list[Any]:
        """The pictures of a kind, read; an error says which of them it is about."""
        given = self.pictures.get(kind, Given("", []))
        found = []
        for number, source in enumerate(given.sources):
            try:
                found.append(read(source))
            except RowError as error:
                details = {"field": given.column, "value": error.value, "expected": error.expected}
                raise RowError(error.reason, f"{kind} {number}: {error.what}", **details) from None
        return found

    def _image(self, source: Any) -> Any:
        own, found = self.reader.config.image, image(source, self.folder)
        if own is None or _bounds_itself(self.reader.processor):
            return found
        return bounded(found, own.min_pixels, own.max_pixels)

    def expanded(self, text: str) -> str:
        """A prompt's text with the pictures' tokens in their places."""
        texts = iter(self.texts)
        return self.reader.places.sub(lambda match: next(texts), text)

    def vision(self, ids: Sequence[int]) -> Vision:
        """What the model sees beside a prompt's token ids."""
        processor, tokens = self.reader.processor, torch.tensor(ids)
        if self.typed:
            types = torch.as_tensor(processor.create_mm_token_type_ids([list(ids)])[0], dtype=torch.long)
        else:
            own = [getattr(processor, f"{kind}_token_id", -1) for kind in KINDS]
            types = sum(((tokens == i).long() * n for n, i in enumerate(own, 1)), torch.zeros_like(tokens))
        sides = (getattr(part, "patch_size", None) for part in (processor, processor.image_processor))
        side = next((int(side) for side in sides if isinstance(side, int)), 16)
        pixels = [value for name, value in self.inputs.items() if name.startswith("pixel_values")]
        patches = sum(len(p) if p.dim() == 2 else p.numel() // (3 * side * side) for p in pixels)
        return Vision(Pixels(self.inputs, self.source), types=types, patches=patches)


def _bounds_itself(processor: Any) -> bool:
    """Whether a processor keeps images between two numbers of pixels, as Qwen's do."""
    return "min_pixels" in getattr(processor.image_processor.valid_kwargs, "__annotations__", {})


def folder_of(file: object, config: TokenizeConfig) -> Path:
    """What the paths of a row's pictures are relative to; `file` is where its row comes from."""
    if config.image is not None and config.image.folder is not None:
        return Path(config.image.folder).expanduser().absolute()
    path = Path(str(file)).expanduser()
    try:
        return path.absolute().parent if path.is_file() else path.absolute() if path.is_dir() else Path.cwd()
    except (OSError, ValueError):  # not a path at all
        return Path.cwd()


# ---- Many of them ----


class Pixels(Mapping[str, Tensor]):
    """The tensors of a prompt's pictures. Forgotten, they are made again from the row whenever they are asked for."""

    __hash__, __eq__ = object.__hash__, object.__eq__

    def __init__(self, tensors: dict[str, Tensor], source: tuple[Any, ...]) -> None:
        self.source, self.fingerprint = source, Vision(tensors).fingerprint
        self._kept: dict[str, Tensor] | None = tensors

    def forget(self) -> None:
        self._kept = None

    def _tensors(self) -> dict[str, Tensor]:
        return _again(self) if self._kept is None else self._kept

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors())

    def __len__(self) -> int:
        return len(self._tensors())


@lru_cache(maxsize=2)  # of what is read several times in a row
def _again(pixels: Pixels) -> dict[str, Tensor]:
    tensors = View(*pixels.source).inputs
    what, expected = "a picture has changed since the rows were read", "files that stay as they are"
    same = Vision(tensors).fingerprint == pixels.fingerprint
    require(same, DataError, what, file=pixels.source[-1], expected=expected)
    return tensors


class Room:
    """Room for the tensors of pictures, `ROOM` bytes; those that come later are forgotten."""

    def __init__(self) -> None:
        self.bytes = 0

    def hold(self, vision: Vision | None) -> Vision | None:
        """The vision as it is to be kept."""
        if vision is None or not isinstance(vision.inputs, Pixels):
            return vision
        self.bytes += sum(value.nbytes for value in vision.inputs.values())
        if self.bytes <= ROOM:
            return whole(vision)
        vision.inputs.forget()
        return vision


def whole(vision: Vision | None) -> Vision | None:
    """The vision with its tensors at hand, as it goes from process to process."""
    forgets = vision is not None and isinstance(vision.inputs, Pixels)
    return replace(vision, inputs=dict(vision.inputs)) if vision is not None and forgets else vision


# ---- Processors, also where torchvision is missing, without which transformers makes no video processor ----


def load_processor(config: Any, path: str, **options: Any) -> Any:
    """The processor in a model's folder; without torchvision, videos are frames that its image processor reads.

    None: the model reads text alone, or its folder has only a tokenizer.
    """
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or type(config) not in PROCESSOR_MAPPING:
        return None
    kind: Any = PROCESSOR_MAPPING[type(config)]
    if not any(cached_file(path, name, _raise_exceptions_for_missing_entries=False) for name in OF_PROCESSORS):
        return None
    if find_spec("PIL") is None:  # text can be read all the same
        return None
    if is_torchvision_available() or "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(path, **options)
    settings, _ = kind.get_processor_dict(path)
    parts = {"image_processor": AutoImageProcessor.from_pretrained(path, **options)}
    parts["tokenizer"] = AutoTokenizer.from_pretrained(path, **options)
    given = settings.pop("video_processor", None) or _video_settings(path)
    takes = inspect.signature(kind).parameters
    return without_torchvision(kind, video=given, **{k: v for k, v in settings.items() if k in takes} | parts)


OF_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def _video_settings(path: str) -> dict[str, Any] | None:
    file = cached_file(path, "video_preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return None if file is None else dict(read_json(file, ModelError))


def without_torchvision(kind: Any, *, video: Mapping[str, Any] | None = None, **parts: Any) -> Any:
    """A processor of a class that has a video processor, made without torchvision; `video`: the settings of that.

    It saves itself whole, so that `AutoProcessor` loads it where torchvision is there.
    """

    made = _without_check(kind)
    named = kind.__name__.removesuffix("Processor").replace("2_5_VL", "2VL") + "VideoProcessor"
    return made(**parts, video_processor=Frames(parts["image_processor"], named, video))


@cache
def _without_check(kind: Any) -> Any:
    class WithoutTorchvision(kind):
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

        def __reduce__(self) -> Any:
            return _unpickled, (kind, vars(self))

    WithoutTorchvision.__name__ = WithoutTorchvision.__qualname__ = kind.__name__
    return WithoutTorchvision


def _unpickled(kind: Any, state: dict[str, Any]) -> Any:
    made = object.__new__(_without_check(kind))
    made.__dict__.update(state)
    return made


OF_PATCHES = ("patch_size", "temporal_patch_size", "merge_size", "size", "image_mean", "image_std")


class Frames(PushToHubMixin):
    """Stands for a video processor: the patches of Qwen2-VL's videos are those of their frames, several in a row.

    Raises `ModelError` for videos of other models, whose patches are no image's.
    """

    _auto_class = None

    def __init__(self, images: Any, named: str, settings: Mapping[str, Any] | None) -> None:
        self.images, self.settings = images, dict(settings or {})
        if not settings:  # those that decide patches, as the frames are read here
            own = images.to_dict() if named.startswith("Qwen") else {}
            self.settings = {name: own[name] for name in OF_PATCHES if name in own}
        self.settings.setdefault("video_processor_type", named)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    @property
    def merge_size(self) -> int:
        return int(self.images.merge_size)

    @property
    def temporal_patch_size(self) -> int:
        return int(self.images.temporal_patch_size)

    def __call__(self, videos: Sequence[np.ndarray], video_metadata: Sequence[Any], **_: Any) -> dict[str, Any]:
        what = "videos of this model need torchvision; expected it installed, or the frames as images"
        require(self.settings["video_processor_type"] == "Qwen2VLVideoProcessor", ModelError, what)
        made = [self._patches(frames) for frames in videos]
        return {
            "pixel_values_videos": torch.cat([pixels for pixels, _ in made]),
            "video_grid_thw": torch.tensor([grid for _, grid in made]),
            "video_metadata": [VideoMetadata(**about) for about in video_metadata],
        }

    def _patches(self, frames: np.ndarray) -> tuple[Tensor, list[int]]:
        """Patches `[t * h * w, d]` and `[t, h, w]`; the last frame is repeated to fill its patch."""
        depth, side = self.temporal_patch_size, int(self.images.patch_size)
        missing = -len(frames) % depth
        each = [self.images(images=[frame], return_tensors="pt") for frame in frames]
        each += each[-1:] * missing
        _, height, width = each[0]["image_grid_thw"][0].tolist()
        pixels = torch.stack([one["pixel_values"] for one in each])
        # An image is repeated along time in each of its patches: of every frame one of these.
        pixels = pixels.view(len(each) // depth, depth, height * width, -1, depth, side * side)[:, :, :, :, 0]
        pixels = pixels.permute(0, 2, 3, 1, 4).reshape(len(each) // depth * height * width, -1)
        return pixels, [len(each) // depth, height, width]
