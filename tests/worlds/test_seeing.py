"""The worlds of pictures: scenes, words and what is wrong in them, base models, and rows that run like a user's."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2VLImageProcessorPil

from tokengrain.batch import TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.data.rows import load_rows
from tokengrain.errors import ModelError, RecipeError
from tokengrain.rewards.timemaster import TimeMaster
from tokengrain.scoring.score import score
from tokengrain.worlds import load_world
from tokengrain.worlds.base_models import EOS
from tokengrain.worlds.clips import ClipsWorld
from tokengrain.worlds.seeing import SeeingWorld, pixel_patches, random_of
from tokengrain.worlds.series import SeriesWorld, best_classes, draw_lines, waves
from tokengrain.worlds.shapes import ShapesWorld

NAMES = ("series", "clips", "shapes")


@pytest.fixture(params=NAMES)
def world(request: pytest.FixtureRequest) -> Any:
    return load_world(f"world://{request.param}?pairs=24&prompts=24")


# ---- Scenes and words ----


def test_scenes_are_the_same_everywhere(world: SeeingWorld) -> None:
    """Bytes of pictures and what is true of them: rows of a seed never change unnoticed."""
    scenes = world.drawn("prompts", "eval", 3)
    content = b"".join(s.frames.tobytes() + repr(sorted(s.truth.items())).encode() for s in scenes)
    assert hashlib.sha256(content).hexdigest()[:12] == SCENES[world.name]
    assert all(s.frames.dtype == np.uint8 and s.frames.shape == (world.frames, *world.size, 3) for s in scenes)
    others = type(world)(replace(world.options, seed=1))
    assert [s.truth for s in others.drawn("prompts", "eval", 3)] == [s.truth for s in scenes]
    assert others.prompts("train", 4)[0]["id"] == "train-0"
    assert not np.array_equal(others.drawn("pairs", "train", 1)[0].frames, world.drawn("pairs", "train", 1)[0].frames)


SCENES = {"series": "9918eddc30c6", "clips": "580f6192fc78", "shapes": "645dbe76b6f5"}


def test_what_is_true_has_nothing_wrong(world: SeeingWorld) -> None:
    random = random_of("test", world.name)
    for scene in world.drawn("prompts", "eval", 20):
        words = world.trace(scene.truth, random, weak=False)
        marks = world.marks(scene.truth, words)
        assert (marks.form, marks.wrong) == (True, [])
        assert marks.decisions
        assert world.is_right(scene.truth, words)
        assert len(words) <= world.max_new_tokens
        told = world.told(words)
        assert told == {name: scene.truth[name] for name in told}
        for length in range(len(words)):  # cut off anywhere it has no form, and the last word is to blame
            cut = world.marks(scene.truth, words[:length])
            assert not cut.form
            assert cut.wrong == ([length - 1] if length else [])
            assert not world.is_right(scene.truth, words[:length])


def test_the_weak_annotator_errs(world: SeeingWorld) -> None:
    random = random_of("weak", world.name)
    scenes = world.drawn("prompts", "eval", 200)
    said = [world.trace(s.truth, random, weak=True) for s in scenes]
    right = np.mean([world.is_right(s.truth, words) for s, words in zip(scenes, said)])
    assert 0.05 < right < 0.9
    assert any(world.marks(s.truth, words).wrong for s, words in zip(scenes, said))


def test_demonstrations_have_the_form(world: SeeingWorld) -> None:
    rows = world.demonstrations("train", 40)
    said = [[*row["completion"].split(), EOS] for row in rows]
    assert all(world.marks(row, words).form for row, words in zip(rows, said))
    assert not all(world.is_right(row, words) for row, words in zip(rows, said))


def test_spans_are_the_wrong_words(world: SeeingWorld) -> None:
    for row in world.pairs("train"):
        chosen, rejected = ([*row[side].split(), EOS] for side in ("chosen", "rejected"))
        assert not world.marks(row, chosen).wrong
        wrong = [rejected[place] for place in world.marks(row, rejected).wrong if rejected[place] != EOS]
        assert [row["rejected"][s["start"] : s["end"]] for s in row["rejected_spans"]][: len(wrong)] == sorted_as(
            wrong, rejected
        )


def sorted_as(words: list[str], text: list[str]) -> list[str]:
    return sorted(words, key=text.index) if len(set(words)) == len(words) else words


def test_series_by_hand() -> None:
    truth = {"label": "saw", "periods": "3", "shape": "ramp"}
    world = SeriesWorld()
    text = "<think> periods 2 shape ramp </think> <class> sine </class>"
    marks = world.marks(truth, [*text.split(), EOS])
    assert (marks.form, marks.decisions, marks.wrong) == (True, [2, 4, 7], [2, 7])
    spoilt = world.marks(truth, [*["<think>", "periods", "3", "shape", "ramp", "<class>", "saw", "</class>"], EOS])
    assert (spoilt.form, spoilt.wrong) == (False, [5])
    assert world.reward([text], **{k: [v] for k, v in truth.items()}) == [0.0]
    assert TimeMaster(labels=["sine", "square", "saw"])([text], label=["sine"]) == [1.0]


def test_clips_by_hand() -> None:
    world, truth = ClipsWorld(), {"order": ["red", "blue", "gold", "pink"]}
    words = ["then", "a", "red", ",", "next", "the", "gold", ";", "next", "the", "blue", ";", "then", "a", "pink", ","]
    marks = world.marks(truth, [*words, EOS])
    assert (marks.form, marks.decisions, marks.wrong) == (True, [2, 6, 10, 14], [6, 10])
    random = random_of("styles")
    sides = [world.sides(scene, random) for scene in world.drawn("pairs", "train", 200)]
    chosen, rejected = (np.mean([word == "then" for pair in sides for word in pair[k][0:16:4]]) for k in (0, 1))
    assert chosen == pytest.approx(0.7, abs=0.05)
    assert rejected == pytest.approx(0.3, abs=0.05)


def test_shapes_by_hand() -> None:
    world, truth = ShapesWorld(), {"cells": ["a2", "b1", "d4"], "count": 3}

    def marks(text: str) -> tuple[bool, list[int]]:
        found = world.marks(truth, [*text.split(), EOS])
        return found.form, found.wrong

    check = "wait look now here ok"
    assert marks("a2 1 b1 2 d4 3 so 3") == (True, [])
    assert marks(f"a2 1 c3 2 {check} b1 2 d4 3 so 3") == (True, [])  # mended
    assert marks(f"a2 1 b1 2 {check} c3 2 d4 3 so 3") == (True, [9])  # spoilt
    assert marks("a2 1 d4 2 so 2") == (True, [2])
    assert marks("a2 1 so 1") == (True, [2])
    assert marks("a2 1 b1 3 d4 3 so 3") == (False, [3])
    assert marks("a2 1 b1 2 d4 3 so 2") == (False, [7])
    assert world.is_right(truth, ["c3", "1", "so", "3", EOS])


def test_the_best_class_of_a_series() -> None:
    """Without noise every wave is known; with it accuracy falls, and enumeration is as good as the prior says."""
    classes, periods, phases = np.arange(3).repeat(3), np.tile([2, 3, 4], 3), np.full(9, 0.25)
    clean = waves(classes, periods, phases)
    assert best_classes(clean, 0.3).tolist() == classes.tolist()
    world = load_world("world://series?noise=1.5")
    assert isinstance(world, SeriesWorld)
    assert 0.5 < world.best_accuracy(world.drawn("prompts", "eval", 200)) < 0.9
    assert draw_lines(clean).min() < 60
    with pytest.raises(RecipeError, match="noise is -1"):
        load_world("world://series?noise=-1")


# ---- Pictures and models ----


def test_patches_are_those_of_the_image_processor(world: SeeingWorld) -> None:
    frames = world.drawn("prompts", "eval", 2)[1].frames
    found = world.processor.image_processor(images=list(frames), return_tensors="pt")
    assert isinstance(world.processor.image_processor, Qwen2VLImageProcessorPil)
    assert torch.equal(found["pixel_values"], pixel_patches(frames))


def test_rows_score_as_the_model_was_trained(world: SeeingWorld) -> None:
    """Users' path from rows to log-probabilities, against the plain forward of the base model's training."""
    rows = world.pairs("eval", 3)
    made = prepare_pairs(load_rows(rows), world.processor, TokenizeConfig(spans={"source": "column"}))
    batch = TokenBatch.from_samples([made[i] for i in range(3)])
    assert batch.prompt(0).tolist() == world.prompt_ids
    with torch.no_grad():
        found = score(world.reference, batch, want=("logps",)).logps
    assert found is not None
    own = []
    for scene, row in zip(world.drawn("pairs", "eval", 3), rows):
        for side in ("chosen", "rejected"):
            said = [*world.encode(row[side].split()), 2]
            ids = torch.tensor([world.prompt_ids + said])
            with torch.no_grad():
                logits = world.reference(input_ids=ids, **world.model_inputs(ids, [scene.frames])).logits
            own += logits.log_softmax(-1)[0, -len(said) - 1 : -1].gather(1, torch.tensor(said)[:, None])[:, 0].tolist()
    assert found.tolist() == pytest.approx(own, abs=1e-5)
    truth = world.truth_of(batch)
    wrong = truth.advantages < 0
    assert wrong.any()
    assert ((batch.columns["spans"] > 0) & ~batch.is_chosen)[wrong].all()
    assert truth.decisions[wrong].all()


def test_the_base_model_is_what_recipes_need(world: SeeingWorld) -> None:
    """Greedy it sees; sampled it errs, so that there is something to learn."""
    world.held_out = 40
    found = world.evaluate(world.reference, n=1)
    assert float(found["greedy_accuracy"] or 0) > 0.85
    assert float(found["accuracy"] or 0) < float(found["greedy_accuracy"] or 0)
    assert float(found["form"] or 0) > 0.5


def test_a_models_own_answers_to_shuffled_frames() -> None:
    world = load_world("world://clips?rejected=shuffled&pairs=6")
    rows = world.pairs()
    assert len(rows) == 6
    for row in rows:
        marks = ClipsWorld().marks(row, [*row["rejected"].split(), EOS])
        assert marks.form
        assert marks.wrong
        assert len(row["rejected_spans"]) == len(row["chosen_spans"]) == len(marks.wrong)


def test_pillow_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for kind in (SeriesWorld, ClipsWorld, ShapesWorld):
        with pytest.raises(ModelError, match=r"rows with pictures need Pillow: pip install 'tokengrain\[vision\]'"):
            kind()


def test_options() -> None:
    with pytest.raises(RecipeError, match="rejected is 'x'; expected swap or shuffled"):
        load_world("world://clips?rejected=x")
    with pytest.raises(RecipeError, match="world shapes: pairs is 0; expected at least 1"):
        load_world("world://shapes?pairs=0")
