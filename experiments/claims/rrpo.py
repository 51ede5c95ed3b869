"""RRPO on slots and style: only the differing facts may change, the style that happens to go with them may not.

A prompt lists three facts. A completion gives each of them back (a slot) after three words of style, each one of a pair
A/B that means nothing. In the preference pairs, chosen completions have more A by accident. Specification: rrpo.md,
section 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.claims.framework import Arm, Claim, Group, Measures
from experiments.claims.tiny_lm import copy_of, logps_of, mean_loss, sample, sft, tiny_llama, token_batch, train
from tokengrain.batch import TokenBatch
from tokengrain.methods.dpo import dpo_loss
from tokengrain.methods.rrpo import rrpo_loss
from tokengrain.scoring.reference import FrozenReference
from tokengrain.scoring.score import score

VALUES, SLOTS, WORDS = 6, 3, 3
STYLE = VALUES  # ids VALUES.. : A and B of each of the nine style positions
BOS = VALUES + 2 * SLOTS * WORDS
ASK, EOS = BOS + 1, BOS + 2
VOCABULARY = BOS + 3
LENGTH = SLOTS * (WORDS + 1) + 1
SLOT_AT = torch.tensor([(WORDS + 1) * (slot + 1) - 1 for slot in range(SLOTS)])
STYLE_AT = torch.tensor([t for t in range(LENGTH - 1) if t % (WORDS + 1) != WORDS])


@dataclass(frozen=True)
class Scale:
    """Steps and sizes."""

    sft_steps: int = 600
    sft_batch: int = 128
    steps: int = 200
    batch: int = 32
    samples: int = 1000


@dataclass
class Context:
    """What the arms of a seed share."""

    seed: int
    scale: Scale
    base: Any
    held_out: TokenBatch

    @property
    def generator(self) -> torch.Generator:
        """The same random numbers for every arm."""
        return torch.Generator().manual_seed(self.seed + 1)


def draw_prompts(n: int, generator: torch.Generator) -> Tensor:
    """Prompts `[n, 5]`: BOS, three facts, ASK."""
    facts = torch.randint(VALUES, (n, SLOTS), generator=generator)
    return torch.cat([torch.full((n, 1), BOS), facts, torch.full((n, 1), ASK)], 1)


def complete(slots: Tensor, share_of_a: float, generator: torch.Generator) -> Tensor:
    """Completions `[n, LENGTH]` with these values in their slots `[n, 3]` and style A with this probability."""
    n = len(slots)
    out = torch.full((n, LENGTH), EOS)
    is_b = (torch.rand(n, len(STYLE_AT), generator=generator) >= share_of_a).long()
    out[:, STYLE_AT] = STYLE + 2 * torch.arange(len(STYLE_AT)) + is_b
    out[:, SLOT_AT] = slots
    return out


def corrupt(facts: Tensor, p_right: float, generator: torch.Generator, *, at_least_one: bool = False) -> Tensor:
    """Facts `[n, 3]`, each kept with probability `p_right` and otherwise replaced by another value."""
    n = len(facts)
    wrong = torch.rand(n, SLOTS, generator=generator) >= p_right
    if at_least_one:
        forced = torch.randint(SLOTS, (n,), generator=generator)
        wrong[torch.arange(n), forced] |= ~wrong.any(1)
    other = (facts + torch.randint(1, VALUES, (n, SLOTS), generator=generator)) % VALUES
    return torch.where(wrong, other, facts)


def sft_batches(scale: Scale, steps: int, generator: torch.Generator) -> Iterator[TokenBatch]:
    for _ in range(steps):
        prompts = draw_prompts(scale.sft_batch, generator)
        slots = corrupt(prompts[:, 1 : 1 + SLOTS], 0.55, generator)
        yield token_batch(prompts, complete(slots, 0.5, generator)[:, None])


def pair_batches(scale: Scale, generator: torch.Generator) -> Iterator[TokenBatch]:
    """Pairs with a column "spans": the slots in which the two sides differ."""
    for _ in range(scale.steps):
        prompts = draw_prompts(scale.batch, generator)
        facts = prompts[:, 1 : 1 + SLOTS]
        wrong = corrupt(facts, 0.55, generator, at_least_one=True)
        chosen, rejected = complete(facts, 0.7, generator), complete(wrong, 0.3, generator)
        spans = torch.zeros(scale.batch, 2, LENGTH)
        spans[:, :, SLOT_AT] = (facts != wrong).float()[:, None]
        yield token_batch(prompts, torch.stack([chosen, rejected], 1), spans=spans)


def prepare(seed: int, scale: Scale) -> Context:
    generator = torch.Generator().manual_seed(seed)
    base = tiny_llama(VOCABULARY, 5 + 2 * LENGTH, seed)
    sft(base, sft_batches(scale, scale.sft_steps, generator), rate=3e-3)
    (held_out,) = sft_batches(Scale(sft_batch=scale.samples // 2), 1, generator)
    return Context(seed, scale, base, held_out)


def run(context: Context, arm: Arm) -> Measures:
    reference = FrozenReference(copy_of(context.base))
    policy = copy_of(context.base)
    generator = context.generator
    if arm.settings:
        train(policy, pair_batches(context.scale, generator), _loss(policy, reference, **arm.settings), rate=3e-4)
    before = measure(reference.model, context, reference)
    after = measure(policy, context, reference)
    return {**after, "style_shift": abs(after["style_a"] - before["style_a"]), "sft_slots": before["slots"]}


def _loss(policy: Any, reference: FrozenReference, objective: str, spans: str, alpha: float, beta: float) -> Any:
    def loss(batch: TokenBatch) -> Tensor:
        if objective == "dpo":
            ref = reference(batch, ("logps",))
            return mean_loss(dpo_loss(logps_of(policy, batch), batch.segments, ref_logps=ref.logps, beta=beta), batch)
        ref = reference(batch, ("logps", "distribution"))
        own = score(policy, batch, ("logps", "kl"), reference=ref.distribution)
        assert own.logps is not None
        assert own.kl is not None
        assert ref.logps is not None  # all were wanted
        where = batch.columns["spans"] if spans == "differing" else torch.ones_like(own.logps)
        out = rrpo_loss(own.logps, batch.segments, ref_logps=ref.logps, kl=own.kl, spans=where, beta=beta, alpha=alpha)
        return mean_loss(out, batch)

    return loss


@torch.no_grad()
def measure(policy: Any, context: Context, reference: FrozenReference) -> dict[str, float]:
    """Right slots and share of A in the policy's samples; KL(reference || policy) per token on held-out SFT text."""
    generator = torch.Generator().manual_seed(context.seed + 2)
    prompts = draw_prompts(context.scale.samples, generator)
    drawn = sample(policy, prompts, LENGTH, generator)
    style = drawn[:, STYLE_AT] - STYLE - 2 * torch.arange(len(STYLE_AT))
    batch = context.held_out
    kl = score(policy, batch, ("kl",), reference=reference(batch, ("distribution",)).distribution).kl
    assert kl is not None
    is_style = (style >= 0) & (style < 2)
    return {
        "slots": float((drawn[:, SLOT_AT] == prompts[:, 1 : 1 + SLOTS]).float().mean()),
        "style_a": float((style == 0).sum() / is_style.sum().clamp(min=1)),
        "kl": float(kl.mean()),
    }


def _pair_arm(name: str, method: str, objective: str, spans: str = "all", alpha: float = 0.0) -> Arm:
    return Arm(name, method, {"objective": objective, "spans": spans, "alpha": alpha, "beta": 0.5})


ARMS = (
    Arm("SFT", "sft"),
    _pair_arm("DPO", "dpo", "dpo"),
    _pair_arm("DPO + chosen KL", "rrpo", "rrpo", "all", 0.05),
    _pair_arm("spans only (α 0)", "rrpo", "rrpo", "differing", 0.0),
    _pair_arm("RRPO", "rrpo", "rrpo", "differing", 0.05),
)
_SPEC = "rrpo.md 7; arXiv 2504.12083"


def _claim(says: str, first: str, second: str | None, measure: str, **more: Any) -> Claim:
    settings = {"robust": True, "source": _SPEC, "judged": "every seed", **more}
    return Claim("rrpo", says, first, second, measure, **settings)


CLAIMS = (
    _claim(
        "RRPO learns the facts",
        "RRPO",
        None,
        "slots",
        expect="above",
        threshold=0.8,
        judged="mean",
        reported="0.90–0.91",
    ),
    _claim(
        "RRPO is above SFT by 0.2", "RRPO", "SFT", "slots", expect="above", threshold=0.2, reported="0.90 and 0.55–0.60"
    ),
    _claim(
        "RRPO leaves spurious style alone",
        "RRPO",
        None,
        "style_shift",
        expect="below",
        threshold=0.06,
        reported="0.49–0.51 from 0.48–0.53",
    ),
    _claim(
        "DPO learns spurious style",
        "DPO",
        None,
        "style_shift",
        expect="above",
        threshold=0.2,
        reported="0.81–0.85 from 0.48–0.53",
    ),
    _claim(
        "RRPO drifts less than half as far as DPO",
        "RRPO",
        "DPO",
        "kl",
        form="ratio",
        expect="below",
        threshold=0.5,
        reported="0.15–0.16 and 0.46–0.48",
    ),
    _claim(
        "Without the KL, spans alone do harm",
        "spans only (α 0)",
        "RRPO",
        "slots",
        expect="below",
        threshold=-0.2,
        reported="0.39–0.53 and 0.90–0.91",
    ),
    Claim(
        "rrpo",
        "The KL on all tokens, not the spans, is not enough: DPO with it still moves style",
        "DPO + chosen KL",
        "RRPO",
        "style_shift",
        "above",
        reported="0.64–0.66 from 0.48–0.53",
        source=_SPEC,
    ),
)

GROUP = Group(
    name="rrpo",
    title="RRPO: slots and style",
    setting=(
        f"Vocabulary {VOCABULARY}; three facts out of six in the prompt; completion of 3 × (3 words of style, A or B, "
        "and one slot) and an end. Llama of 2 layers, width 48; SFT of 600 steps on text with 55 % right slots and as "
        "much A as B; pairs whose chosen side has all slots right and A with 0.7, the rejected at least one wrong and "
        "A with 0.3. 200 steps of 32 pairs, Adam 3e-4, β 0.5. KL is that of the policy from the SFT model per token of "
        "held-out SFT text, in nats."
    ),
    scales=(Scale(), Scale(sft_steps=60, sft_batch=32, steps=12, batch=16, samples=100)),
    arms=ARMS,
    claims=CLAIMS,
    prepare=prepare,
    run=run,
    columns={"slots": "right slots", "style_a": "P(style A)", "style_shift": "shift of P(A)", "kl": "KL per token"},
)
