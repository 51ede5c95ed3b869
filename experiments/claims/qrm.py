"""Q-RM on counting: does a reward model of whole completions know which tokens are right, and what is that worth?

A prompt is one digit a; the right token at place t is (a + 3t) mod 10. Specification: qrm.md, section 7. The prompt's
digits are tokens of their own: a Llama that sees one digit alone could not tell a prompt from an answer by position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.claims.framework import Arm, Group, Measures, Source
from experiments.claims.tiny_lm import copy_of, logps_of, mean_loss, sft, tiny_llama, token_batch, train
from tokengrain.batch import Segments, TokenBatch
from tokengrain.evaluation.credit import auc
from tokengrain.loss import Counts, make_normaliser
from tokengrain.methods._shaping import scale_scores
from tokengrain.methods.dpo import dpo_loss
from tokengrain.methods.ppo import reinforce_loss
from tokengrain.methods.qrm import qrm_loss
from tokengrain.models import reward_model_from
from tokengrain.scoring.score import score
from tokengrain.scoring.token_scores import frozen_token_scores, pooled_scores

DIGITS, LENGTH = 10, 8
P_RIGHT, SLOPE = 0.5, 2.0
DPO_BETA = 0.1
REACHED = 0.9
RIGHT = (torch.arange(DIGITS)[:, None] + 3 * torch.arange(LENGTH)) % DIGITS
"""The right token for every prompt at every place, long `[10, 8]`."""

TokenScores = Callable[[TokenBatch], Tensor]


@dataclass(frozen=True)
class Scale:
    """Steps and sizes."""

    sft_steps: int = 600
    steps: int = 1500
    batch: int = 64
    held_out: int = 2000
    reinforce_steps: int = 400
    reinforce_batch: int = 64


@dataclass
class Context:
    """What the arms of a seed share."""

    seed: int
    scale: Scale
    backbone: Any
    held_out: TokenBatch


def behaviour(prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Completions `[n, 8]` of prompts `[n]`: the right token with probability ½, else any of the ten."""
    shape = (len(prompts), LENGTH)
    keep = torch.rand(shape, generator=generator) < P_RIGHT
    return torch.where(keep, RIGHT[prompts], torch.randint(DIGITS, shape, generator=generator))


def digit_batch(prompts: Tensor, completions: Tensor) -> TokenBatch:
    """Prompts `[n]` and completions `[n, C, 8]` as a batch."""
    return token_batch(DIGITS + prompts[:, None], completions)


def is_right(batch: TokenBatch) -> Tensor:
    """Whether each token is the right one, bool `[N]`."""
    return batch.labels == RIGHT[batch.prompt_ids[batch.group] - DIGITS].flatten()


def draw_pairs(n: int, generator: torch.Generator) -> TokenBatch:
    """Pairs of behaviour with Bradley-Terry labels on twice the number of right tokens."""
    prompts = torch.randint(DIGITS, (n,), generator=generator)
    both = torch.stack([behaviour(prompts, generator) for _ in range(2)], 1)
    right = (both == RIGHT[prompts][:, None]).sum(-1)
    first_wins = torch.rand(n, generator=generator) < torch.sigmoid(SLOPE * (right[:, 0] - right[:, 1]))
    return digit_batch(prompts, torch.where(first_wins[:, None, None], both, both.flip(1)))


def sft_batches(scale: Scale, generator: torch.Generator) -> Iterator[TokenBatch]:
    for _ in range(scale.sft_steps):
        prompts = torch.randint(DIGITS, (2 * scale.batch,), generator=generator)
        yield digit_batch(prompts, behaviour(prompts, generator)[:, None])


def prepare(seed: int, scale: Scale) -> Context:
    generator = torch.Generator().manual_seed(seed)
    backbone = tiny_llama(2 * DIGITS, 1 + 2 * LENGTH, seed)
    sft(backbone, sft_batches(scale, generator), rate=3e-3)
    return Context(seed, scale, backbone, draw_pairs(scale.held_out, generator))


def run(context: Context, arm: Arm) -> Measures:
    generator = torch.Generator().manual_seed(context.seed + 1)
    pairs = (draw_pairs(context.scale.batch, generator) for _ in range(context.scale.steps))
    settings = dict(arm.settings)
    if settings.pop("kind") == "dpo":
        token_scores, pooled = _dpo_model(context, pairs, **settings)
    else:
        token_scores, pooled = _reward_model(context, pairs, **settings)
    batch = context.held_out
    chosen, rejected = batch.segments.pairs(pooled(batch))
    return {
        "pair_accuracy": float((chosen > rejected).float().mean()),
        "auc": auc(token_scores(batch), is_right(batch)),
        "steps_to_90": float(reinforce(context, token_scores)),
    }


def _reward_model(
    context: Context, pairs: Iterator[TokenBatch], pooling: Any, beta: float, gamma: float
) -> tuple[TokenScores, TokenScores]:
    """A trained reward model as scores of tokens `[N]` and of completions `[C]`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        model = reward_model_from(copy_of(context.backbone))

    def loss(batch: TokenBatch) -> Tensor:
        scores = score(model, batch, ("token_scores",)).token_scores
        assert scores is not None  # they were wanted
        return mean_loss(qrm_loss(scores, batch.segments, pooling=pooling, beta=beta, gamma=gamma), batch)

    train(model, pairs, loss, rate=1e-3)

    def pooled(batch: TokenBatch) -> Tensor:
        return pooled_scores(frozen_token_scores(model, batch), batch.segments, pooling)

    if pooling == "last":  # the outcome's score for every token
        return lambda batch: batch.segments.broadcast(pooled(batch)), pooled
    return lambda batch: frozen_token_scores(model, batch), pooled


def _dpo_model(context: Context, pairs: Iterator[TokenBatch], beta: float) -> tuple[TokenScores, TokenScores]:
    """The same from a DPO-trained language model: β times the log-ratio to its start, summed over a completion."""
    policy, start = copy_of(context.backbone), context.backbone

    def reference(batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            return logps_of(start, batch)

    def loss(batch: TokenBatch) -> Tensor:
        out = dpo_loss(logps_of(policy, batch), batch.segments, ref_logps=reference(batch), beta=beta)
        return mean_loss(out, batch)

    train(policy, pairs, loss, rate=1e-3)

    def token_scores(batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            return beta * (logps_of(policy, batch) - reference(batch))

    return token_scores, lambda batch: batch.segments.sum(token_scores(batch))


def reinforce(context: Context, token_scores: TokenScores) -> int:
    """Steps of REINFORCE on a table of logits until 90 % of its tokens are right; the most there are, if never.

    The table starts as the behaviour. Rewards are the token scores, z-scored over all tokens of a step. Plain SGD:
    Adam divides the noise out of the steps that it should slow down.
    """
    scale, generator = context.scale, torch.Generator().manual_seed(context.seed + 2)
    start = torch.full((DIGITS, LENGTH, DIGITS), (1 - P_RIGHT) / DIGITS)
    start.scatter_(2, RIGHT[..., None], P_RIGHT + (1 - P_RIGHT) / DIGITS)
    logits = nn.Parameter(start.log())
    optimiser = torch.optim.SGD([logits], 20.0)
    segments = Segments(torch.arange(scale.reinforce_batch + 1) * LENGTH)
    normalise, counts = make_normaliser("token_mean"), Counts.of(segments, pairs=False)
    for step in range(scale.reinforce_steps):
        with torch.no_grad():
            if float(logits.softmax(-1).gather(2, RIGHT[..., None]).mean()) >= REACHED:
                return step
            prompts = torch.randint(DIGITS, (scale.reinforce_batch,), generator=generator)
            drawn = torch.multinomial(logits[prompts].softmax(-1).flatten(0, 1), 1, generator=generator)
            tokens = drawn.view(-1, LENGTH)
            rewards = scale_scores(token_scores(digit_batch(prompts, tokens[:, None])), "zscore")
        logps = logits[prompts].log_softmax(-1).gather(2, tokens[..., None]).flatten()
        optimiser.zero_grad()
        normalise(reinforce_loss(logps, segments, advantages=rewards), counts).backward()
        optimiser.step()
    return scale.reinforce_steps


def _reward(name: str, pooling: str, beta: float, gamma: float) -> Arm:
    return Arm(name, "qrm", {"kind": "reward", "pooling": pooling, "beta": beta, "gamma": gamma})


ARMS = (
    _reward("Q-RM (0.2, 2)", "mean", 0.2, 2.0),
    _reward("Q-RM (1, 0)", "mean", 1.0, 0.0),
    _reward("last-token ORM", "last", 1.0, 0.0),
    Arm("DPO-RM", "qrm", {"kind": "dpo", "beta": DPO_BETA}),
)


SOURCE = Source("qrm", "qrm.md 7; arXiv 2505.23363")


CLAIMS = (
    SOURCE.sure(
        "Q-RM knows right tokens better than an outcome model, by 0.15",
        "Q-RM (0.2, 2)",
        "last-token ORM",
        "auc",
        "above",
        threshold=0.15,
        reported="0.997 and 0.69",
    ),
    SOURCE.sure(
        "at equal accuracy on pairs",
        "Q-RM (0.2, 2)",
        "last-token ORM",
        "pair_accuracy",
        "within",
        threshold=0.03,
        reported="0.84 and 0.85",
    ),
    SOURCE.sure(
        "REINFORCE with its scores needs less than half the steps",
        "Q-RM (0.2, 2)",
        "last-token ORM",
        "steps_to_90",
        "below",
        form="ratio",
        threshold=0.5,
        reported="28 and 110",
    ),
    SOURCE.claim(
        "Q-RM knows right tokens better than DPO-RM",
        "Q-RM (0.2, 2)",
        "DPO-RM",
        "auc",
        "above",
        reported="0.997 and 1.00: a finding about large models",
    ),
    SOURCE.claim(
        "REINFORCE needs fewer steps with Q-RM than with DPO-RM",
        "Q-RM (0.2, 2)",
        "DPO-RM",
        "steps_to_90",
        "below",
        reported="28 and 21: a finding about large models",
    ),
    SOURCE.claim(
        "The margin helps: β 0.2 and γ 2 against β 1 and γ 0",
        "Q-RM (0.2, 2)",
        "Q-RM (1, 0)",
        "auc",
        "above",
        reported="0.997 and 0.953",
    ),
)

GROUP = Group(
    name="qrm",
    title="Q-RM: counting in steps of three",
    setting=(
        "Ten digits; the prompt is a digit a, the right token at place t of 8 is (a + 3t) mod 10. Behaviour takes "
        "it with probability ½ and any digit otherwise; Bradley-Terry labels on twice the difference of right counts. "
        "Reward models start from a Llama of 2 layers, width 48, fine-tuned on behaviour, and are trained on 64 fresh "
        "pairs a step, Adam 1e-3. AUC of the token's score for being right (of the last score, broadcast, for the "
        "outcome model) and accuracy on 2,000 held-out pairs with labels as noisy. REINFORCE: a table of logits that "
        "starts as the behaviour, rewards z-scored over a step of 64 samples, SGD 20, at most 400 steps."
    ),
    scales=(Scale(), Scale(sft_steps=10, steps=5, batch=16, held_out=50, reinforce_steps=5, reinforce_batch=16)),
    arms=ARMS,
    claims=CLAIMS,
    prepare=prepare,
    run=run,
    columns={"pair_accuracy": "pair accuracy", "auc": "token AUC", "steps_to_90": "steps to 90 %"},
)
