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
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import ModelError
from tokengrain.loss import Counts, make_normaliser, make_role
from tokengrain.method import CREDIT, make_credit, make_objective
from tokengrain.methods.aligndistil import ContrastiveTeacher
from tokengrain.models import measure_scores, reward_model_from
from tokengrain.rewards.reward_model import RewardModel
from tokengrain.rewards.suite import RewardError, RewardSuite
from tokengrain.scoring.reference import FrozenReference
from tokengrain.scoring.token_scores import frozen_token_scores
from tokengrain.training.critic import Critic
from tokengrain.training.step import CreditUse, PreferenceLoss
from tokengrain.vision import unseen

LOOKING = {"contrastive", "contrastive_dpo", "entropy", "gradient_attribution", "guide", "reward_model"}
LOOKING |= {"lookahead", "sight", "surprise", "tdpo"}


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
    samples = list(prepare_pairs(rows, processor, TokenizeConfig(spans="diff")))
    batch = TokenBatch.from_samples(samples)
    count = batch.segments.total
    batch = batch.with_columns(token_rewards=torch.linspace(-0.5, 0.5, count).double())
    policy, first, second = tiny_vlm(QWEN), other(1), other(2)
    objects = {"model": first, "reference": FrozenReference(second), "reverse": second}
    objects |= {"tokenizer": processor.tokenizer}
    words = {"better": "red what {prompt}", "worse": "blue a {prompt}"}  # that the tokenizer knows
    settings: dict[str, Any] = {"contrastive": {"templates": words}, "column": {"column": "token_rewards"}}
    settings["function"] = {"function": lambda b: b.labels.double() / 10}
    sources = {}
    torch.manual_seed(0)
    scorer = reward_model_from(other(3))
    measure_scores(scorer, samples)
    for name in sorted(CREDIT):
        given = objects | {"model": scorer} if CREDIT[name].reward_model else objects
        takes = {key: value for key, value in given.items() if key in CREDIT[name].objects}
        sources[name] = make_credit(name, **takes, **settings.get(name, {}))
    values = {name: source(batch).detach() for name, source in sources.items()}
    return {"batch": batch, "policy": policy, "reference": FrozenReference(second), "sources": sources} | {
        "values": values,
        "scorer": scorer,
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
    judged = judge(seen["scorer" if objective == "qrm" else "policy"], batch)
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
        make_credit("reward_model", model=tiny("llama", scorer=True, vocab_size=64), scaling="none")(batch)


def test_what_is_not_seen_has_no_sight(seen):
    """Behind a prompt without pictures, and of pictures that are grey already."""
    batch: TokenBatch = seen["batch"]
    rows = [Sample([4, 5], [Completion([6, 7])]), batch.sample(0, [Completion([8, 9, 10])])]
    source = make_credit("sight", model=seen["policy"])
    found = source(TokenBatch.from_samples(rows))
    assert found[:2].tolist() == [0.0, 0.0]
    assert float(found[2:].abs().min()) > 1e-4
    blind = replace(batch, vision=tuple(unseen(vision) for vision in batch.vision))
    assert float(source(blind).abs().max()) < 1e-5
    assert source(TokenBatch.from_samples(rows[:1])).tolist() == [0.0, 0.0]


def test_a_critic_looks_and_learns_to(seen):
    batch: TokenBatch = seen["batch"]
    critic = Critic(tiny_vlm(QWEN), lr=1e-3)
    critic.begin(max_steps=1)
    values = critic.values(batch)
    blind = replace(batch, vision=tuple(unseen(vision) for vision in batch.vision))
    assert float((critic.values(blind) - values).abs().max()) > 1e-3
    weight = critic.model.model.visual.patch_embed.proj.weight
    before = weight.detach().clone()
    metrics = critic.update(batch.with_columns(returns=torch.ones_like(values), values=values))
    assert metrics["critic/loss"] > 0
    assert not torch.equal(weight, before)


def test_a_reward_model_looks(seen):
    """As a reward of whole completions, on what a sampler gives."""
    batch: TokenBatch = seen["batch"]
    suite = RewardSuite([RewardModel(model=seen["scorer"], pooling="mean")], tokenizer=made_by_hand(QWEN).tokenizer)
    found = suite.score(batch).total
    by_hand = [float(part.mean()) for part in batch.segments.split(frozen_token_scores(seen["scorer"], batch))]
    assert found.tolist() == pytest.approx(by_hand, abs=1e-6)
    text = tiny("llama", scorer=True, vocab_size=64)
    blind = RewardSuite([RewardModel(model=text, pooling="mean")], tokenizer=made_by_hand(QWEN).tokenizer)
    with pytest.raises(RewardError, match="have images or videos, which the reward model does not see"):
        blind.score(batch)


@pytest.mark.parametrize("objective", sorted(tables.objectives()))
def test_every_objective_takes_every_credit(seen, objective):
    """In all the ways that the table of credit and objectives lists; the gradient reaches the vision tower."""
    uses: list[CreditUse | None] = []
    for name, source in seen["sources"].items():
        cell = tables.cell(name, objective)
        for way in ("reward", "importance", "weight", "selection", "span"):
            if way in cell:
                above = {"above": 0.0} if way == "selection" and source.values == "marks" else {}
                values = seen["values"][name]
                values = values.abs() if objective == "ti_dpo" else values  # an importance
                uses.append(CreditUse(Known(source, values), make_role(way, **above)))
    uses = uses or [None]  # an objective that takes no credit
    trained = seen["scorer" if objective == "qrm" else "policy"]
    tower = [weight for name, weight in trained.named_parameters() if "visual" in name]
    for number, use in enumerate(uses):
        loss = loss_of(seen, objective, use)
        assert bool(torch.isfinite(loss)), use
        assert loss.requires_grad, use
        if number == 0:
            gradients = torch.autograd.grad(loss, tower, allow_unused=True)
            assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0
