"""Pictures beside heat maps: a row's images and frames as PNG, and which of their patches a completion rests on."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.text import Text
from torch import Tensor, nn

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.data.formats import pictured
from tokengrain.data.pictures import frames, image
from tokengrain.scoring.model import device_of, evaluating
from tokengrain.scoring.prepare import unwrapped
from tokengrain.scoring.score import score
from tokengrain.vision import grey

BLUE, ORANGE = (63, 143, 203), (207, 122, 29)  # of credit in the terminal
MOST, SIDE = 8, 256  # pictures shown of a row, and the longest side of each in pixels


def png(pixels: np.ndarray) -> bytes:
    """An image `[H, W, 3]` of bytes as a PNG, without any library of pictures."""
    height, width, _ = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, 3 * width)], 1)  # 0: no filter

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(lines.tobytes())) + chunk(b"IEND", b"")


def pixels_of(row: Mapping[str, Any], folder: Path | None = None) -> list[np.ndarray]:
    """The images of a row and then the frames of its videos, uint8 `[H, W, 3]` each, at most `MOST`, made small."""
    found: list[np.ndarray] = []
    for kind, given in pictured(row, row.get("prompt") or "")[1].items():
        for source in given.sources:
            arrays = isinstance(source, np.ndarray)
            if kind == "image":
                found.append(source if arrays else np.asarray(image(source, folder)))
            else:
                found += list(source) if arrays else [np.asarray(f) for f in frames(source, folder, None)[0]]
    steps = [max(1, -(-max(pixels.shape[:2]) // SIDE)) for pixels in found[:MOST]]
    return [np.ascontiguousarray(pixels[::step, ::step]) for pixels, step in zip(found, steps)]


GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}  # of Qwen-VL's patches
RATED = {
    "gradient": "gradient times input of the log-probability of the first completion",
    "without": "what the log-probability of the first completion loses where they are grey",
}
"""What the values of patches are, by how they are rated."""

By = Literal["gradient", "without"]
CELLS, MERGE = 256, 2  # most parts of a prompt's pictures that are made grey; patches along a token's side


def patch_credit(model: nn.Module, batch: TokenBatch, by: By = "gradient") -> list[list[np.ndarray]]:
    """Which patches the log-probability of each prompt's first completion rests on (nats).

    Args:
        by: "gradient": gradient times input of each patch, one backward pass; "without": what is lost if the patches of
            a token are made grey, one forward pass for each (for every few neighbours, where there are more than 256).

    Returns:
        For each prompt, for each of its images and frames `[rows, columns]`; empty for prompts without pictures, and
        for models whose pixels do not come as Qwen-VL's patches.
    """
    firsts = [batch.group.tolist().index(g) for g in range(batch.n_prompts)]
    samples = [batch.sample(g, [Completion(batch.completion(c).tolist())]) for g, c in enumerate(firsts)]
    seen = [{} if s.vision is None else {n: s.vision.inputs[n] for n in GRIDS if n in s.vision.inputs} for s in samples]
    known = [s.vision is not None and all(GRIDS[n] in s.vision.inputs for n in own) for s, own in zip(samples, seen)]
    seen = [own if fits else {} for own, fits in zip(seen, known)]
    values = (_by_gradient if by == "gradient" else _by_leaving_out)(model, samples, seen)
    found = []
    for sample, own in zip(samples, values):
        grids = {} if sample.vision is None else sample.vision.inputs
        found.append([part for name, each in own.items() for part in _unmerged(each, grids[GRIDS[name]])])
    return found


Seen = list[dict[str, Tensor]]  # of each prompt by name: pixels `[patches, d]`, or values `[patches]`


def _with(sample: Sample, pixels: Mapping[str, Tensor]) -> Sample:
    """The prompt and completion with other pixels."""
    vision = sample.vision and replace(sample.vision, inputs={**sample.vision.inputs, **pixels})
    return replace(sample, vision=vision)


def _by_gradient(model: nn.Module, samples: list[Sample], seen: Seen) -> Seen:
    leaves = [{name: pixels.clone().requires_grad_() for name, pixels in own.items()} for own in seen]
    with evaluating(model), _unfrozen(model), torch.enable_grad():
        logps = _logps(model, [_with(sample, own) for sample, own in zip(samples, leaves)])
        inputs = [leaf for own in leaves for leaf in own.values()]
        gradients = iter(torch.autograd.grad(logps.sum(), inputs, allow_unused=True) if inputs else ())
    rated = [{name: (pixels, next(gradients)) for name, pixels in own.items()} for own in leaves]
    return [{n: (p * g).sum(-1).detach() for n, (p, g) in own.items() if g is not None} for own in rated]


def _by_leaving_out(model: nn.Module, samples: list[Sample], seen: Seen) -> Seen:
    found: Seen = []
    for sample, own in zip(samples, seen):
        size = MERGE**2 * max(1, -(-sum(map(len, own.values())) // (MERGE**2 * CELLS)))
        places = [(n, slice(at, at + size)) for n, pixels in own.items() for at in range(0, len(pixels), size)]
        values = {name: torch.zeros(len(pixels)) for name, pixels in own.items()}
        with evaluating(model):
            whole = _logps(model, [sample]).sum()
            for name, part in places:
                left = _logps(model, [_with(sample, {name: grey(own[name], part)})]).sum()
                values[name][part] = float(whole - left) / len(own[name][part])
        found.append(values)
    return found


def _logps(model: nn.Module, samples: list[Sample]) -> Tensor:
    found = score(model, TokenBatch.from_samples(samples).to(device_of(unwrapped(model))), ("logps",)).logps
    assert found is not None
    return found


@contextmanager
def _unfrozen(model: nn.Module) -> Iterator[None]:
    """What a frozen vision tower gives is kept without its graph, so nothing is frozen while the block runs."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _unmerged(values: Tensor, grids: Tensor, merge: int = MERGE) -> list[np.ndarray]:
    """Values of patches, in the order of Qwen-VL's tokens, as maps `[rows, columns]`, one per image and frame."""
    maps, at = [], 0
    for t, h, w in grids.tolist():
        own = values[at : at + t * h * w].reshape(t, h // merge, w // merge, merge, merge)
        maps += list(own.permute(0, 1, 3, 2, 4).reshape(t, h, w).cpu().numpy())
        at += t * h * w
    return maps


def shown(
    row: Mapping[str, Any], maps: list[np.ndarray] | None = None, folder: Path | None = None, by: By = "gradient"
) -> list[dict[str, Any]]:
    """The pictures of a row for `credit_samples.json`: `png` in base64, `size`; perhaps `patches`, and what `by`."""
    made = []
    pixels = pixels_of(row, folder)
    for i, own in enumerate(pixels):
        entry: dict[str, Any] = {"png": base64.b64encode(png(own)).decode(), "size": [own.shape[1], own.shape[0]]}
        if maps is not None and len(maps) >= len(pixels):
            entry |= {"patches": [[round(float(v), 6) for v in line] for line in maps[i]], "by": by}
        made.append(entry)
    return made


def drawn(picture: Mapping[str, Any]) -> dict[str, Any]:
    """A picture for the page: its PNG, size, and a rectangle `(x, y, width, height, strength, sign)` for each patch."""
    width, height = picture["size"]
    patches = picture.get("patches") or []
    scale = max((abs(value) for line in patches for value in line), default=0.0) or 1.0
    rectangles = [
        (
            *(round(v, 2) for v in (j * width / len(line), i * height / len(patches))),
            *(round(v, 2) for v in (width / len(line), height / len(patches))),
            round(abs(value) / scale, 3),
            "p" if value > 0 else "n",
        )
        for i, line in enumerate(patches)
        for j, value in enumerate(line)
        if abs(value) > 0.04 * scale
    ]
    return {"png": picture["png"], "width": width, "height": height, "rectangles": rectangles}


def half_blocks(picture: Mapping[str, Any], most: int = 48) -> Text:
    """A picture for the terminal, two pixels in each character, at most so many columns wide.

    Patches with values are tinted: blue above 0, orange below.
    """
    pixels = _decoded(picture)
    values = np.array(picture.get("patches") or [[0.0]])
    places = (np.arange(size) * parts // size for size, parts in zip(pixels.shape[:2], values.shape))
    shares = (values / (np.abs(values).max() or 1.0))[np.ix_(*places)][:, :, None]
    pixels = (1 - 0.7 * np.abs(shares)) * pixels + 0.7 * np.abs(shares) * np.where(shares > 0, BLUE, ORANGE)
    step = -(-pixels.shape[1] // most)
    pixels = pixels[::step, ::step]
    pixels = pixels[: len(pixels) // 2 * 2].astype(int)
    text = Text()
    for top, bottom in zip(pixels[::2], pixels[1::2]):
        for above, below in zip(top, bottom):
            text.append("\u2580", "rgb({},{},{}) on rgb({},{},{})".format(*above, *below))
        text.append("\n")
    return text


def _decoded(picture: Mapping[str, Any]) -> np.ndarray:
    """The pixels of a picture that `shown` made. Raises an error of some kind for anything else."""
    width, height = picture["size"]
    content, at, parts = base64.b64decode(picture["png"], validate=True), 8, []
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        parts += [content[at + 8 : at + 8 + size]] if content[at + 4 : at + 8] == b"IDAT" else []
        at += size + 12
    expected = (3 * width + 1) * height
    lines = zlib.decompressobj().decompress(b"".join(parts), expected + 1)  # a bomb stops there
    return np.frombuffer(lines, np.uint8).reshape(height, 3 * width + 1)[:, 1:].reshape(height, width, 3)


def is_picture(value: Any) -> bool:
    """Whether it is a picture as `shown` makes them: what stands in `credit_samples.json` is not trusted."""
    try:
        whole = all(type(side) is int and 1 <= side <= SIDE for side in value["size"])
        numbers = all(math.isfinite(v) for line in value.get("patches", []) for v in line)
        return whole and numbers and bool(_decoded(value).size)
    except Exception:  # whatever is wrong with it
        return False
