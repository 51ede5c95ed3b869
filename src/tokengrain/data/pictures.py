"""Pictures as rows have them -> images in memory: PIL, bytes, paths, data URLs, arrays, frames, files of videos.

What a row names is not trusted: an image is looked at before it is unpacked, and nothing is fetched from the network.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokengrain.data.config import RowError, VideoConfig, check
from tokengrain.errors import ModelError, shown

KINDS = ("image", "video")
"""Kinds of pictures; the columns are called so, or with an s for lists."""

LARGEST = 1 << 27  # pixels of an image, and bytes of its file
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no format that runs a program to be read
FRAMES, MOST_FRAMES = 32, 1 << 16  # of a video: used where the settings do not say, and looked through
EXPECTED = "a PIL image, bytes, a path, {'bytes', 'path'}, or an array [height, width, 3] of whole numbers 0 to 255"


def pillow() -> Any:
    """The module `PIL.Image`. Raises `ModelError` where Pillow is missing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ModelError("rows with pictures need Pillow: pip install 'tokengrain[vision]'") from error
    return Image


def held(source: Any) -> Any:
    """A picture's source; images in the place of arrays, which cannot be compared and written."""
    if isinstance(source, np.ndarray) and source.ndim == 4:
        return [image_of_array(frame) for frame in source]
    return image_of_array(source) if isinstance(source, np.ndarray) else source


def image_of_array(values: Any) -> Any:
    """The image of an array. Raises `RowError` unless its shape is `[height, width, 3]` and it holds bytes."""
    shape = "x".join(map(str, values.shape))
    fits = values.ndim == 3 and values.shape[2] == 3 and values.size and values.dtype.kind in "iu"
    got = f"array {shape} of {values.dtype}"
    check(fits, "pictures", "is no image", value=got, expected=EXPECTED)
    check(values.min() >= 0 and values.max() <= 255, "pictures", "is no image", value=got, expected=EXPECTED)
    return pillow().fromarray(np.ascontiguousarray(values, dtype=np.uint8), "RGB")


def image(source: Any, base: Path | None = None) -> Any:
    """An RGB image of PIL; paths are relative to `base`. Raises `RowError`."""
    module = pillow()
    if isinstance(source, (list, tuple)) and source:
        return _of_lists(source)
    if isinstance(source, np.ndarray):
        return image_of_array(source)
    if isinstance(source, module.Image):
        return _rgb(source, f"{source.width}x{source.height} {source.mode}")
    content, name = content_of(source, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is too large is an error here, whatever PIL says
        try:
            found = module.open(io.BytesIO(content), formats=FORMATS)
        except module.DecompressionBombError as error:
            raise _unreadable(name, f"is too large ({error})") from None
        except Exception as error:  # damage has many kinds
            reason = "is no image" if type(error).__name__ == "UnidentifiedImageError" else f"is damaged ({error})"
            raise _unreadable(name, f"{reason}: {', '.join(FORMATS)} are read") from None
        pixels = found.width * found.height
        check(pixels <= LARGEST, "pictures", f"{name} is too large", value=f"{pixels} pixels", expected=f"{LARGEST}")
        return _rgb(found, name)


def _rgb(found: Any, name: str) -> Any:
    """The image upright, in three channels, in memory."""
    from PIL import ImageOps

    try:
        low, high = found.getextrema() if found.mode[0] in "IF" else (0, 255)
        fits = low >= 0 and high <= 255 and (found.mode[0] == "I" or high > 1)  # RGB would cut off all beyond
        made = ImageOps.exif_transpose(found).convert("RGB")
    except Exception as error:
        raise _unreadable(name, f"is damaged ({type(error).__name__}: {error})") from None
    value, expected = f"{low} to {high} (mode {found.mode})", "8 bits per channel, 0 to 255"
    check(fits, "pictures", f"{name} has other values than a picture", value=value, expected=expected)
    return made


def _of_lists(source: Sequence[Any]) -> Any:
    try:
        values = np.asarray(source)
    except (ValueError, TypeError):  # ragged
        values = np.empty((0,))
    check(values.ndim == 3, "pictures", "is no image", value=source, expected=EXPECTED)
    return image_of_array(values)


def _unreadable(name: str, reason: str) -> RowError:
    return RowError("pictures", f"{name} {reason}", value=name, expected="an image that can be read")


def content_of(source: Any, base: Path | None, most: int = LARGEST) -> tuple[bytes, str]:
    """The bytes of a picture that is in the row or in a file, and its name for messages. Raises `RowError`."""
    if isinstance(source, Mapping):
        given = source.get("bytes")
        source = source.get("path") if given is None else given
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source), f"a picture of {len(source)} bytes"
    if isinstance(source, str) and source.startswith("data:"):
        head, _, text = source.partition(",")
        try:
            return base64.b64decode(text if head.endswith(";base64") else "!", validate=True), head[:40]
        except binascii.Error:
            raise _unreadable(shown(source[:40]), "is no data URL in base64") from None
    what, network = "is not fetched from the network", isinstance(source, str) and "://" in source
    check(not network, "pictures", what, value=source, expected="a file, or the picture's bytes in the row")
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise RowError("pictures", f"is of type {type(source).__name__}", value=source, expected=EXPECTED)
    path = placed(source, base)
    try:
        check(path.is_file(), "pictures", "there is no such file", value=str(path), expected="a picture's file")
        size = path.stat().st_size
        check(size <= most, "pictures", "the file is too large", value=f"{size} bytes", expected=f"{most} at most")
        return path.read_bytes(), str(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _unreadable(shown(str(path)), f"cannot be read: {reason}") from None


def placed(path: str | os.PathLike[str], base: Path | None) -> Path:
    """Where a row's path leads."""
    given = Path(os.fspath(path)).expanduser()
    return given if base is None else base / given


# ---- Videos ----


def frames(source: Any, base: Path | None, config: VideoConfig | None) -> tuple[list[Any], dict[str, Any]]:
    """The frames of a video, as many as the settings say, and where they stood in it. Raises `RowError`."""
    config = config or VideoConfig(frames=FRAMES)
    most = config.frames or FRAMES
    if isinstance(source, np.ndarray):
        source = held(source)
    if isinstance(source, (list, tuple)):
        check(source, "pictures", "the video has no frames", value=source, expected="at least one frame")
        chosen = spaced(len(source), most)
        found = [image(source[i], base) for i in chosen]
        about: dict[str, Any] = {"total_num_frames": len(source), "fps": config.fps}
    else:
        chosen, found, about = _decoded(source, base, most)
    sizes = sorted({each.size for each in found})
    what, value = "the frames of a video are of several sizes", ", ".join(f"{w}x{h}" for w, h in sizes)
    check(len(sizes) == 1, "pictures", what, value=value, expected="frames of one size")
    return [bounded(each, None, config.max_pixels) for each in found], {**about, "frames_indices": chosen}


def spaced(count: int, most: int) -> list[int]:
    """Numbers of at most `most` of `count` frames, evenly spaced, the first and the last among them."""
    return list(range(count)) if count <= most else np.linspace(0, count - 1, most).round().astype(int).tolist()


def _decoded(source: Any, base: Path | None, most: int) -> tuple[list[int], list[Any], dict[str, Any]]:
    try:
        import av
    except ImportError as error:
        raise ModelError("files of videos need PyAV: pip install 'tokengrain[video]'") from error
    content, name = content_of(source, base, 16 * LARGEST)
    try:
        with av.open(io.BytesIO(content), "r") as container:
            stream = container.streams.video[0]
            pixels, fps = stream.width * stream.height, stream.average_rate
            what, expected = f"{name} has frames of another size", f"1 to {LARGEST}"
            check(0 < pixels <= LARGEST, "pictures", what, value=f"{pixels} pixels", expected=expected)
            count = sum(1 for _, _ in zip(container.decode(stream), range(MOST_FRAMES)))
        what, expected = f"{name} is too long", f"fewer than {MOST_FRAMES} frames; cut it, or give frames as a list"
        check(count < MOST_FRAMES, "pictures", what, value=f"{count} frames or more", expected=expected)
        chosen = spaced(count, most)
        with av.open(io.BytesIO(content), "r") as container:
            wanted, decoded = set(chosen), container.decode(container.streams.video[0])
            found = [frame.to_image().convert("RGB") for number, frame in enumerate(decoded) if number in wanted]
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        expected = "a file of a video that FFmpeg can decode"
        raise RowError("pictures", f"{name} is no video, or damaged ({error})", value=name, expected=expected) from None
    check(found, "pictures", f"{name} has no frames", value=name, expected="at least one frame")
    return chosen, found, {"total_num_frames": count, "fps": float(fps) if fps else None}


def bounded(found: Any, least: int | None, most: int | None) -> Any:
    """The image, made smaller or larger to so many pixels at most and at least."""
    pixels = found.width * found.height
    wanted = max(min(pixels, most or pixels), least or 0)
    if wanted == pixels:
        return found
    scale = (wanted / pixels) ** 0.5
    rounded = int if wanted < pixels else lambda side: int(-(-side // 1))
    return found.resize(tuple(max(1, rounded(side * scale)) for side in found.size), pillow().Resampling.BICUBIC)


# ---- Pictures as files keep them ----


def stored(source: Any, base: Path | None = None) -> Any:
    """A picture as rows keep it that are written to a file: `{"bytes", "path"}`, or a list of these for frames."""
    if isinstance(source, (list, tuple)) and not _is_pixels(source):
        return [stored(each, base) for each in source]
    if isinstance(source, Mapping):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, (bytes, bytearray, memoryview)) or str(source).startswith("data:"):
        return {"bytes": content_of(source, base)[0], "path": None}
    if isinstance(source, (str, os.PathLike)):
        return {"bytes": None, "path": os.path.abspath(placed(source, base))}
    content = io.BytesIO()
    image(source, base).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def paths_in(value: Any) -> Iterator[str]:
    """The paths in a row whose pictures are `stored`."""
    if isinstance(value, Mapping):
        if value.keys() == {"bytes", "path"}:
            yield from [value["path"]] if value["path"] is not None else []
            return
        value = value.values()
    if not isinstance(value, (str, bytes)) and isinstance(value, Iterable):
        for each in value:
            yield from paths_in(each)


def as_json(value: Any) -> Any:
    """For `json.dumps`, of what JSON lacks: bytes as a data URL, which is read as a picture again."""
    if isinstance(value, bytes):
        return "data:;base64," + base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} is no value of JSON")


def _is_pixels(source: Any) -> bool:
    """Whether it is an image `[height][width][3]` as lists."""
    for _ in range(2):
        source = source[0] if isinstance(source, (list, tuple)) and source else None
    return isinstance(source, (list, tuple)) and bool(source) and isinstance(source[0], int)
