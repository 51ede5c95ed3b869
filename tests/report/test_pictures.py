"""Pictures beside heat maps: PNG, what patches are worth, the page and the terminal."""

from __future__ import annotations

import base64
import io
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tokengrain.batch import Completion, TokenBatch
from tokengrain.errors import DataError
from tokengrain.report.html import maps_page, show_credit
from tokengrain.report.pictures import MOST, RATED, SIDE, half_blocks, patch_credit, pixels_of, png, shown
from tokengrain.report.rows import collect_credit_samples, parsed, read_credit_samples
from tokengrain.report.terminal import inspect_rows
from tokengrain.scoring.reference import scorer_logps
from tokengrain.vision import grey
from tokengrain.worlds import load_world
from tokengrain.worlds.shapes import CELLS


def read(content: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_png() -> None:
    pixels = np.random.RandomState(0).randint(256, size=(5, 9, 3)).astype(np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


def test_pictures_of_a_row(tmp_path: Path) -> None:
    large = np.full((2 * SIDE + 2, 4, 3), 9, np.uint8)
    Image.fromarray(large).save(tmp_path / "a.png")
    video = np.zeros((MOST + 3, 4, 6, 3), np.uint8)
    found = pixels_of({"prompt": "x", "images": ["a.png", large], "videos": [video]}, tmp_path)
    assert [pixels.shape for pixels in found] == [(172, 2, 3)] * 2 + [(4, 6, 3)] * (MOST - 2)
    assert pixels_of({"prompt": "x"}) == []
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    assert len(pixels_of({"prompt": parts, "image": large})) == 1


@pytest.fixture(scope="module")
def truth() -> Any:
    return load_world("world://shapes").credit_truth(6)


def test_gradient_times_input_finds_what_is_counted(truth: Any) -> None:
    """Patches of red squares move the answer more than the others do."""
    world = load_world("world://shapes")
    maps = patch_credit(world.reference, truth.batch)
    assert not any(p.requires_grad or p.grad is not None for p in world.reference.parameters())
    for row, (values,) in zip(world.pairs("eval", 6, seed=0), maps, strict=True):
        cells = np.abs(values).reshape(4, 2, 4, 2).sum((1, 3)).ravel()
        red = [CELLS.index(cell) for cell in row["cells"]]
        assert cells[red].mean() > 2 * np.delete(cells, red).mean()


def test_what_is_lost_without_a_patch_finds_it_too(truth: Any) -> None:
    world = load_world("world://shapes")
    batch = truth.batch.select([0, 1])
    maps = patch_credit(world.reference, batch, by="without")
    for row, (values,) in zip(world.pairs("eval", 2, seed=0), maps, strict=True):
        assert values.shape == (8, 8)
        cells = values.reshape(4, 2, 4, 2).sum((1, 3)).ravel()
        red = [CELLS.index(cell) for cell in row["cells"]]
        assert cells[red].mean() > 2 * np.abs(np.delete(cells, red)).mean()
    # The first token by hand: its four patches, grey, change the log-probability by the sum of their values.
    sample = batch.sample(0, [Completion(batch.completion(0).tolist())])
    assert sample.vision is not None
    pixels = grey(sample.vision.inputs["pixel_values"], slice(0, 4))
    less = replace(sample, vision=replace(sample.vision, inputs={**sample.vision.inputs, "pixel_values": pixels}))
    whole, left = (scorer_logps(world.reference, TokenBatch.from_samples([s])).sum() for s in (sample, less))
    assert float(maps[0][0][:2, :2].sum()) == pytest.approx(float(whole - left), abs=1e-4)


def test_frames_have_maps_of_their_own() -> None:
    world = load_world("world://clips")
    batch = world.credit_truth(2).batch
    maps = patch_credit(world.reference, batch)
    assert [[values.shape for values in own] for own in maps] == [[(4, 4)] * 4] * 2


def test_the_page_shows_pictures_and_patches(truth: Any, tmp_path: Path) -> None:
    world = load_world("world://shapes")
    maps = patch_credit(world.reference, truth.batch)
    html = show_credit(truth.batch, world.tokenizer, {"truth": truth.advantages}, maps=maps, count=2).html
    assert html.count("data:image/png;base64,") == 2
    assert html.count("&lt;rect class=") > 20
    entries = collect_credit_samples(truth.batch, world.tokenizer, {"truth": truth.advantages}, maps=maps)
    (tmp_path / "credit_samples.json").write_text(json.dumps(entries))
    samples = read_credit_samples(tmp_path / "credit_samples.json")
    # Another source that rates them in its own way has the pictures once more.
    other = collect_credit_samples(truth.batch, world.tokenizer, {"sight": -truth.advantages}, maps=maps, by="without")
    html = maps_page(parsed([*entries, *other]))
    assert [html.count(note) for note in RATED.values()] == [6, 6]
    plain = collect_credit_samples(truth.batch, world.tokenizer, {"plain": 2 * truth.advantages})
    html = maps_page(parsed([*plain, *other]))
    assert [html.count(note) for note in RATED.values()] == [0, 6]
    assert samples[0].prompt.count("<img>") == 1
    scene = world.drawn("pairs", "eval", 1, 0)[0]
    assert np.array_equal(read(samples[0].pictures[0]["png"]), scene.frames[0])


ONE = base64.b64encode(png(np.zeros((1, 1, 3), np.uint8))).decode()
BOMB = base64.b64encode(b"PNG.." + b"...\x00\x00\x28\x00IDAT" + zlib.compress(bytes(10**7))).decode()


@pytest.mark.parametrize(
    "picture",
    [
        {"png": ONE[:60], "size": [1, 1]},
        {"png": ONE, "size": [1, 10**9]},
        {"png": ONE, "size": [0, 0]},
        {"png": ONE, "size": [1, 1], "patches": 3},
        {"png": ONE, "size": [1, 1], "patches": [[float("nan")]]},
        {"png": BOMB, "size": [1, 1]},
        {"png": '"/><script>', "size": [1, 1]},
        {"png": "", "size": [1]},
        {"png": "", "size": ["a", 1]},
        {"png": "", "size": [1, 1], "patches": [["x"]]},
        {"size": [1, 1]},
        "a.png",
    ],
)
def test_what_is_no_picture_is_an_error(picture: Any, tmp_path: Path) -> None:
    side = {"tokens": ["a"], "credit": [1.0]}
    path = tmp_path / "credit_samples.json"
    path.write_text(json.dumps([{"prompt": "p", "source": "s", "chosen": side, "pictures": [picture]}]))
    with pytest.raises(DataError, match="field 'pictures': no pictures"):
        read_credit_samples(path)


def test_the_terminal() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = [255, 0, 0]
    picture = shown({"prompt": "", "images": [pixels]})[0]
    text = half_blocks(picture)
    assert text.plain == ("▀" * 6 + "\n") * 2
    assert "rgb(255,0,0) on rgb(0,0,0)" in str(text.spans[0].style)
    (rated,) = shown({"prompt": "", "images": [pixels]}, [np.array([[2.0, -2.0, 0.0]])])
    colours = [str(span.style) for span in half_blocks(rated).spans[6:]]  # black pixels
    assert (
        colours
        == ["rgb(44,100,142) on rgb(44,100,142)"] * 2
        + ["rgb(144,85,20) on rgb(144,85,20)"] * 2
        + ["rgb(0,0,0) on rgb(0,0,0)"] * 2
    )


def test_inspect_shows_a_rows_pictures(tmp_path: Path) -> None:
    world = load_world("world://clips?pairs=3")
    rows = [
        {**row, "videos": [[{"bytes": png(frame), "path": None} for frame in video] for video in row["videos"]]}
        for row in world.pairs()
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    for colours, expected in (("truecolor", "▀"), (None, "28x28, 28x28, 28x28, 28x28")):
        out = io.StringIO()
        console = Console(file=out, width=140, color_system=colours, force_terminal=colours is not None)
        inspect_rows(
            tmp_path / "pairs.parquet", count=1, field="spans", tokenizer=str(world.base_model()), console=console
        )
        assert expected in out.getvalue()
        assert out.getvalue().count("<vid>") <= 2


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
