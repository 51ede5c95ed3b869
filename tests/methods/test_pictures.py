"""Any credit with any objective on pictures: one table, on a tiny model that sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.test_vision import QWEN, made_by_hand, said
from tests.scoring.models import tiny
from tests.tiny_vlms import picture, tiny_vlm
from tokengrain import tables
from tokengrain.batch import TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import ModelError
from tokengrain.loss import Counts, make_normaliser, make_role
from tokengrain.method import CREDIT, make_credit, make_objective
from tokengrain.methods.aligndistil import ContrastiveTeacher
from tokengrain.scoring.reference import FrozenReference
from tokengrain.training.step import CreditUse, PreferenceLoss

LOOKING = {"contrastive", "contrastive_dpo", "entropy", "gradient_attribution", "guide", "surprise", "tdpo"}
REWARD = {"reward_model", "qrm"}  # reward models read text alone


def other(seed: int) -> Any:
    model, generator = tiny_vlm(QWEN), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator).to(weight)
    return model


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """Models, a batch of two pairs with one and two images, and its credit by every source."""
    ask = {"type": "text", "text": "what is this ?"}
    rows = [
        {
            "prompt": said(*[{"type": "image", "image": picture(i)} for i in numbers], ask),
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
        }
        for numbers, good, bad in (((0,), "a b c", "a d c"), ((1, 2), "red blue", "red g a"))
    ]
    processor = made_by_hand(QWEN)
    batch = TokenBatch.from_samples(list(prepare_pairs(rows, processor, TokenizeConfig(spans="diff"))))
    count = batch.segments.total
    batch = batch.with_columns(token_rewards=torch.linspace(-0.5, 0.5, count).double())
    policy, first, second = tiny_vlm(QWEN), other(1), other(2)
    objects = {"model": first, "reference": FrozenReference(second), "reverse": second}
    objects |= {"tokenizer": processor.tokenizer}
    words = {"better": "red what {prompt}", "worse": "blue a {prompt}"}  # that the tokenizer knows
    settings: dict[str, Any] = {"contrastive": {"templates": words}, "column": {"column": "token_rewards"}}
    settings["function"] = {"function": lambda b: b.labels.double() / 10}
    sources = {}
    for name in sorted(set(CREDIT) - REWARD):
        takes = {key: value for key, value in objects.items() if key in CREDIT[name].objects}
        sources[name] = make_credit(name, **takes, **settings.get(name, {}))
    values = {name: source(batch).detach() for name, source in sources.items()}
    return {"batch": batch, "policy": policy, "reference": FrozenReference(second), "sources": sources} | {
        "values": values,
        "teacher": ContrastiveTeacher(target=FrozenReference(first), contrast=FrozenReference(second), r=2.0),
    }


class Known:
    """A source of credit whose values are known."""

    def __init__(self, source: Any, values: Tensor) -> None:
        self.name, self.values, self.known = source.name, source.values, values

    def __call__(self, batch: TokenBatch) -> Tensor:
        return self.known

    def fingerprint(self) -> str:
        return self.name


def loss_of(seen: dict[str, Any], objective: str, use: CreditUse | None = None) -> Tensor:
    bound, batch = make_objective(objective), seen["batch"]
    teacher = seen["teacher"] if objective == "aligndistil" else None
    judge = PreferenceLoss(bound, seen["reference"], use, teacher=teacher)
    judged = judge(seen["policy"], batch)
    counts = Counts.of(batch.segments, pairs=bound.unit == "pairs", prompts=batch.n_prompts)
    return make_normaliser("mean")(judged.output, counts)


def test_every_source_gives_credit_and_looks_at_the_pictures(seen):
    batch: TokenBatch = seen["batch"]
    pixels = [replace(v, inputs={**v.inputs, "pixel_values": -v.inputs["pixel_values"]}) for v in batch.vision]
    others = replace(batch, vision=tuple(pixels))
    for name, values in seen["values"].items():
        assert values.shape == (batch.segments.total,), name
        assert bool(torch.isfinite(values).all()), name
        if name in LOOKING:
            changed = seen["sources"][name](others).detach()
            assert float((changed - values).abs().max()) > 1e-3, name
    with pytest.raises(ModelError, match="takes no images"):
        make_credit("reward_model", model=scorer(), scaling="none")(batch)


def scorer() -> Any:
    return tiny("llama", scorer=True, vocab_size=64)


@pytest.mark.parametrize("objective", sorted(set(tables.objectives()) - REWARD))
def test_every_objective_takes_every_credit(seen, objective):
    """In all the ways that the table of credit and objectives lists; the gradient reaches the vision tower."""
    uses: list[CreditUse | None] = []
    for name, source in seen["sources"].items():
        cell = tables.cell(name, objective)
        for way in ("reward", "weight", "selection", "span"):
            if way in cell:
                above = {"above": 0.0} if way == "selection" and source.values == "marks" else {}
                values = seen["values"][name]
                values = values.abs() if objective == "ti_dpo" else values  # an importance
                uses.append(CreditUse(Known(source, values), make_role(way, **above)))
    uses = uses or [None]  # an objective that takes no credit
    tower = [weight for name, weight in seen["policy"].named_parameters() if "visual" in name]
    for number, use in enumerate(uses):
        loss = loss_of(seen, objective, use)
        assert bool(torch.isfinite(loss)), use
        assert loss.requires_grad, use
        if number == 0:
            gradients = torch.autograd.grad(loss, tower, allow_unused=True)
            assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0
