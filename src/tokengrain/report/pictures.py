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
from typing import Any

import numpy as np
import torch
from rich.text import Text
from torch import Tensor, nn

from tokengrain.batch import Completion, TokenBatch
from tokengrain.data.formats import pictured
from tokengrain.data.pictures import frames, image
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.score import score

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


def patch_credit(model: nn.Module, batch: TokenBatch) -> list[list[np.ndarray]]:
    """Gradient times input, by patch, of the log-probability of each prompt's first completion.

    Returns:
        For each prompt, for each of its images and frames `[rows, columns]`; empty for prompts without pictures, and
        for models whose pixels do not come as Qwen-VL's patches.
    """
    samples, leaves = [], []
    for g in range(batch.n_prompts):
        vision = batch.vision[g] if batch.vision else None
        leaf: dict[str, Tensor] = {}
        if vision is not None:
            leaf = {n: v.clone().requires_grad_() for n, v in vision.inputs.items() if n.startswith("pixel_values")}
            vision = replace(vision, inputs={**vision.inputs, **leaf})
        first = batch.group.tolist().index(g)
        samples.append(batch.sample(g, [Completion(batch.completion(first).tolist())], vision=vision))
        leaves.append(leaf)
    with evaluating(model), _unfrozen(model), torch.enable_grad():
        logps = score(model, TokenBatch.from_samples(samples), want=("logps",)).logps
        assert logps is not None
        inputs = [leaf for own in leaves for leaf in own.values()]
        gradients = iter(torch.autograd.grad(logps.sum(), inputs, allow_unused=True) if inputs else ())
    found = []
    for sample, own in zip(samples, leaves):
        rated = {name: (pixels, next(gradients)) for name, pixels in own.items()}
        known = sample.vision.inputs if sample.vision is not None else {}
        maps: list[np.ndarray] = []
        for name, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            pixels, gradient = rated.get(name, (None, None))
            if pixels is not None and gradient is not None and grids in known:
                maps += _unmerged((pixels * gradient).sum(-1).detach(), known[grids])
        found.append(maps)
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


def _unmerged(values: Tensor, grids: Tensor, merge: int = 2) -> list[np.ndarray]:
    """Values of patches, in the order of Qwen-VL's tokens, as maps `[rows, columns]`, one per image and frame."""
    maps, at = [], 0
    for t, h, w in grids.tolist():
        own = values[at : at + t * h * w].reshape(t, h // merge, w // merge, merge, merge)
        maps += list(own.permute(0, 1, 3, 2, 4).reshape(t, h, w).cpu().numpy())
        at += t * h * w
    return maps


def shown(
    row: Mapping[str, Any], maps: list[np.ndarray] | None = None, folder: Path | None = None
) -> list[dict[str, Any]]:
    """The pictures of a row for `credit_samples.json`: `png` in base64, `size`, and perhaps values of `patches`."""
    made = []
    pixels = pixels_of(row, folder)
    for i, own in enumerate(pixels):
        entry: dict[str, Any] = {"png": base64.b64encode(png(own)).decode(), "size": [own.shape[1], own.shape[0]]}
        if maps is not None and len(maps) >= len(pixels):
            entry["patches"] = [[round(float(v), 6) for v in line] for line in maps[i]]
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
    """A picture for the terminal, two pixels in each character, at most so many columns wide."""
    pixels = _decoded(picture)
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
