"""Time a DPO step with one image per prompt against the same step written plainly.

    python -m benchmarks.vision_step
    python -m benchmarks.vision_step --freeze --side 448

The plain step has a row per completion, so that the vision tower and the prompt run twice, and takes the softmax of all
logits. Steps alternate in one process and ratios are taken pair by pair. The losses of the second step show that the
work is the same.
"""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.preference_step import _bounds
from benchmarks.steps import BETA, Step, optimiser_of
from benchmarks.timing import alternating, machine, ratio
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import write_json
from tokengrain.method import make_objective
from tokengrain.models import freeze_vision
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.reference import FrozenReference, resolve_reference
from tokengrain.training.step import PreferenceLoss
from tokengrain.vision import Vision, collate

IMAGE, VIDEO, START, END = range(4)
PATCH, MERGED = 14, 2  # pixels of a patch's side; patches that become one token, each way


@dataclass(frozen=True)
class Setting:
    """What is measured; lengths in tokens, ranges inclusive."""

    pairs: int = 4
    side: int = 224  # of an image, in pixels
    prompt: tuple[int, int] = (32, 64)  # text beside the image
    completion: tuple[int, int] = (32, 64)
    vocabulary: int = 32_000
    hidden: int = 256
    layers: int = 6
    depth: int = 6  # layers of the vision tower
    freeze: bool = False  # the vision tower, in both steps
    seed: int = 0


def build_model(setting: Setting) -> Any:
    torch.manual_seed(setting.seed)
    heads = setting.hidden // 64
    text = {
        "vocab_size": setting.vocabulary,
        "hidden_size": setting.hidden,
        "intermediate_size": 4 * setting.hidden,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]},
    }
    tower = {
        "depth": setting.depth,
        "hidden_size": setting.hidden,
        "intermediate_size": 4 * setting.hidden,
        "num_heads": heads,
        "out_hidden_size": setting.hidden,
        "fullatt_block_indexes": [setting.depth - 1],
    }
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    special = dict(zip(names, (IMAGE, VIDEO, START, END), strict=True))
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=tower, **special))
    if setting.freeze:
        freeze_vision(model)
    return model


def build_samples(setting: Setting) -> list[Sample]:
    draw, noise = random.Random(setting.seed), torch.Generator().manual_seed(setting.seed)
    grid = setting.side // PATCH
    placeholders = [START, *[IMAGE] * (grid // MERGED) ** 2, END]

    def ids(bounds: tuple[int, int]) -> list[int]:
        return [draw.randrange(END + 1, setting.vocabulary) for _ in range(draw.randint(*bounds))]

    def vision() -> Vision:
        pixels = torch.randn(grid**2, 3 * 2 * PATCH**2, generator=noise)
        return Vision({"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, grid, grid]])}, patches=grid**2)

    return [
        Sample(placeholders + ids(setting.prompt), [Completion(ids(setting.completion)) for _ in range(2)], vision=v)
        for v in (vision() for _ in range(setting.pairs))
    ]


class Both(Step):
    """What ours and the plain step share."""

    name = ""

    def __init__(self, setting: Setting) -> None:
        self.policy = build_model(setting)
        self.reference: Any = resolve_reference(None, self.policy, {"ref_logps"}, False)
        self.optimiser = optimiser_of(self.policy)
        self.samples = build_samples(setting)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Make what is not timed."""


class Ours(Both):
    name = "tokengrain"

    def prepare(self) -> None:
        prepare(self.policy)
        assert isinstance(self.reference, FrozenReference)
        self.judge = PreferenceLoss(make_objective("dpo", beta=BETA), self.reference, None)

    def loss(self) -> Tensor:
        # New pictures at every step, so that a frozen tower has them to compute.
        fresh = [s.again(s.completions, vision=s.vision and replace(s.vision)) for s in self.samples]
        return self.judge(self.policy, TokenBatch.from_samples(fresh)).output.losses.mean()


class Plain(Both):
    name = "plain transformers"

    def prepare(self) -> None:
        rows = [[*s.prompt_ids, *c.ids] for s in self.samples for c in s.completions]
        starts = torch.tensor([len(s.prompt_ids) for s in self.samples for _ in s.completions])
        lengths, width = torch.tensor([len(row) for row in rows]), max(map(len, rows))
        self.ids = torch.tensor([row + [END + 1] * (width - len(row)) for row in rows])
        place = torch.arange(width)
        self.mask = (place < lengths[:, None]).long()
        self.counted = ((place >= starts[:, None]) & (place < lengths[:, None]))[:, 1:]
        self.pictures = collate([s.vision for s in self.samples for _ in s.completions if s.vision is not None])

    def logps(self, model: Any) -> Tensor:
        """Log-probability of every completion, `[pairs, 2]`."""
        types = (self.ids == IMAGE).long()
        given = {"attention_mask": self.mask, "mm_token_type_ids": types, **self.pictures}
        logits = model(input_ids=self.ids, use_cache=False, **given).logits[:, :-1]
        found = logits.log_softmax(-1).gather(-1, self.ids[:, 1:, None]).squeeze(-1)
        return (found * self.counted).sum(1).view(-1, 2)

    def loss(self) -> Tensor:
        with torch.no_grad():
            known = self.logps(self.reference.model)
        ratios = self.logps(self.policy) - known
        return -F.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()


def main(
    pairs: int = 4,
    side: Annotated[int, typer.Option(help="of the images, in pixels; a multiple of 28")] = 224,
    prompt: Annotated[str, typer.Option(help="tokens of text, such as 32-64")] = "32-64",
    completion: str = "32-64",
    freeze: bool = False,
    repeats: int = 5,
    output: Annotated[Path | None, typer.Option(help="a JSON file for the numbers")] = None,
) -> None:
    """Print both steps' seconds and their ratio."""
    setting = Setting(pairs, side, _bounds(prompt), _bounds(completion), freeze=freeze)
    timings = alternating([Ours(setting), Plain(setting)], repeats)
    ours, plain = timings["seconds"]
    found = {
        **machine("benchmarks.vision_step"),
        "setting": vars(setting),
        "parameters": sum(p.numel() for p in build_model(setting).parameters()),
        **{clock: {t.name: t.summary(1)["median_s"] for t in pair} for clock, pair in timings.items()},
        "faster": {clock: ratio(plain, ours) for clock, (ours, plain) in timings.items()},
        "loss_difference": abs(plain.second_loss - ours.second_loss),
    }
    print(json.dumps(found, indent=1))
    if output is not None:
        write_json(output, found)


if __name__ == "__main__":
    typer.run(main)
