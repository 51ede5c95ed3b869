"""R3, the reasoning reflection reward of DRO (arXiv 2506.13351 v1): reference tokens that depend on the reasoning.

A prompt has G rollouts. Each rollout's reasoning is followed by the *reference* answer instead of its own, and the
reference is scored token by token: flat vectors `[N]` in which every completion is the reference under one rollout,
so that the completions of a group have equally many tokens. Tokens whose log-probability varies over the rollouts
weigh more:

    sigma_j = deviation over i of lp[i, j]    w_j ~ sigma_j^power [sigma_j >= threshold]    R3_i = sum_j w_j lp[i, j]

Sigma measures variability, not relevance: with noise of heavy tails over tokens R3 is worse than the plain mean
(power 0). Choices that the paper leaves open are arguments; their defaults are ours. Nothing carries gradient.
A reward belongs to the rollout: `group_advantages(rewards, group, eps=1e-4)`, broadcast over its own tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from tokengrain.batch import Completion, Sample, Segments, TokenBatch
from tokengrain.data.tokens import StopStrings
from tokengrain.errors import DataError, ModelError, RecipeError
from tokengrain.loss import top_tokens
from tokengrain.method import Card, RolloutStep, rollout_credit
from tokengrain.methods._rollout import mean, shares
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.reference import scorer_logps
from tokengrain.scoring.score import head_of, in_parts, score
from tokengrain.settings import NonNegative, Number, Positive, Share

CARD = Card(
    "dro",
    "DRO",
    "reasoning that predicts the reference",
    "Direct Reasoning Optimization: LLMs Can Reward And Refine Their Own Reasoning for Open-Ended Tasks",
    "2506.13351",
    "2025",
    trains="policy, online",
    credit="likelihood of the reference's tokens that depend on the reasoning",
    objective="grpo",
)

Normalise = Literal["sum", "mean", "none"]
Rule = Literal["threshold", "top"]
CHUNK = 4_000_000  # elements held at once by the propagation


@dataclass(frozen=True)
class Propagation:
    """The correction for what a wrong token does to those after it.

    Attributes:
        gamma: how fast it fades, per token; 0: never, infinite: no correction.
        window: tokens within which it acts; None: all.
        rule, value: which tokens are reflective, see `reflective_tokens`.
    """

    gamma: float = 0.5
    window: int | None = None
    rule: Rule = "top"
    value: float = 0.1


@dataclass(frozen=True)
class R3:
    """Rewards and what they come from.

    Attributes:
        rewards: `[C]`; NaN for rollouts that are left out.
        tokens: `[N]`, what every reference token adds to the reward.
        sigma, weights: `[N]`, equal for all rollouts of a group.
        reflective: bool `[N]`, the tokens that propagation starts from; None without.
        log_propagation: `[N]`, what it adds to the log-probabilities, <= 0; None without.
        metrics: `[C]` each.
    """

    rewards: Tensor
    tokens: Tensor
    sigma: Tensor
    weights: Tensor
    reflective: Tensor | None = None
    log_propagation: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


def r3_rewards(
    logps: Tensor,
    segments: Segments,
    group: Tensor,
    *,
    usable: Tensor | None = None,
    baseline: Tensor | None = None,
    propagation: Propagation | None = None,
    power: float = 1.0,
    threshold: float = 0.0,
    normalize: Normalise = "sum",
    ddof: int = 0,
    floor: float | None = None,
    min_sigma: float = 0.0,
    positions: Tensor | None = None,
) -> R3:
    """R3 of every rollout: plain, with a masked baseline, or with propagation.

    Args:
        logps: log-probabilities of the reference tokens after each rollout's reasoning `[N]`, nats.
        segments: cuts `[N]` into C rollouts.
        group: long `[C]`, the prompt of each.
        usable: bool `[C]`; a rollout without a finished reasoning has reward NaN and no part in sigma. None: all.
        baseline: the same log-probabilities with the reasoning masked `[N]`, subtracted. If all rollouts of a group
            have the same (`repeat_for_rollouts`), every reward of the group shifts alike and advantages within the
            group are exactly those without: then it only serves clipping, comparison across prompts, and logs.
        propagation: see there; not together with a baseline.
        power: 1: weights go with the deviation, 2: with the variance, 0: the plain mean.
        threshold: the deviation below which a token has weight 0, nats.
        normalize: "sum": weights add up to 1 (R3 is a mean, nats per token), "mean": to their number, "none".
        ddof: of the deviation.
        floor: least log-probability, since one at -50 swamps all others; None: none.
        min_sigma: a group whose largest deviation is below it has rewards NaN: what varies is noise.
        positions: place of every token in the reference, for distances `[N]`; None: that among counted tokens.
    """
    if baseline is not None and propagation is not None:
        raise ValueError("r3_rewards: give a baseline or a propagation, not both")
    lp = logps.detach()
    lp = lp if floor is None else lp.clamp(min=floor)
    sigma = variability(lp, segments, group, ddof=ddof, usable=usable)
    weights = r3_weights(sigma, segments, power=power, threshold=threshold, normalize=normalize)
    values, reflective, spread = lp, None, None
    if baseline is not None:
        below = baseline.detach()
        values = lp - (below if floor is None else below.clamp(min=floor))
    if propagation is not None:
        p = propagation
        reflective = reflective_tokens(sigma, segments, rule=p.rule, value=p.value)
        spread = log_propagation(lp, reflective, segments, gamma=p.gamma, window=p.window, positions=positions)
        values = lp + spread
    # A token of weight 0 adds nothing, whatever its log-probability.
    tokens = torch.where(weights > 0, weights * values, 0.0)
    largest = torch.where(segments.lengths > 0, segments.max(sigma), 0.0)
    left_out = (segments.lengths == 0) | (largest < min_sigma)
    if usable is not None:
        left_out = left_out | ~usable.bool()
    rewards = torch.where(left_out, torch.nan, segments.sum(tokens))
    effective = _effective(weights, segments)
    metrics = {"r3/sigma_max": largest, "r3/sigma": segments.mean(sigma), "r3/effective_tokens": effective}
    return R3(rewards, tokens, sigma, weights, reflective, spread, metrics)


def variability(
    logps: Tensor, segments: Segments, group: Tensor, *, ddof: int = 0, usable: Tensor | None = None
) -> Tensor:
    """sigma: standard deviation of each reference token's log-probability over the rollouts of its group, `[N]`.

    Equal for all rollouts of a group; 0 where fewer than two are usable, and exactly 0 where all are equal.

    Raises:
        ValueError: rollouts of one group with different numbers of tokens: they are not the same reference.
    """
    slot, slots = _slots(segments, group)
    lp = logps.detach()
    keep = torch.ones_like(slot, dtype=torch.bool) if usable is None else segments.broadcast(usable.bool())

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(slots).index_add(0, slot[keep], values[keep])

    count = total(torch.ones_like(lp))
    mean = (total(lp) / count.clamp(min=1))[slot]
    low = lp.new_full((slots,), torch.inf).scatter_reduce(0, slot[keep], lp[keep], "amin")
    high = lp.new_full((slots,), -torch.inf).scatter_reduce(0, slot[keep], lp[keep], "amax")
    # Masked before the square: a rollout that is left out may hold anything, infinities included.
    squares = total(torch.where(keep, lp - mean, 0.0).square())
    variance = squares / (count - ddof).clamp(min=1)
    return torch.where((high > low) & (count > ddof), variance, 0.0).sqrt()[slot]


def r3_weights(
    sigma: Tensor, segments: Segments, *, power: float = 1.0, threshold: float = 0.0, normalize: Normalise = "sum"
) -> Tensor:
    """Weights from deviations, `[N]`; uniform where all (nearly) vanish and normalisation would divide by 0."""
    if power < 0:
        raise ValueError(f"r3_weights: power must not be negative, got {power}")
    w = torch.where(sigma >= threshold, sigma**power, 0.0)
    if normalize == "none":
        return w
    if normalize not in ("sum", "mean"):
        raise ValueError(f"normalize must be 'sum', 'mean' or 'none', got {normalize!r}")
    total, length = segments.sum(w), segments.lengths.to(w.dtype)
    flat = segments.broadcast(total <= 1e-12 * length)
    share = torch.where(flat, 1 / segments.broadcast(length), w / segments.broadcast(torch.where(total > 0, total, 1)))
    return share if normalize == "sum" else share * segments.broadcast(length)


def reflective_tokens(sigma: Tensor, segments: Segments, *, rule: Rule = "top", value: float = 0.1) -> Tensor:
    """The tokens that reflect the reasoning, bool `[N]`; how they are chosen is not specified in the paper.

    Args:
        rule: "threshold": sigma >= value; "top": the highest share `value` of each completion, rounded up, the
            earliest among equals.
    """
    if rule == "threshold":
        return sigma >= value
    if rule != "top":
        raise ValueError(f"rule must be 'threshold' or 'top', got {rule!r}")
    if not 0 < value <= 1:
        raise ValueError(f"the share of reflective tokens must lie in (0, 1], got {value}")
    return top_tokens(sigma, segments, share_counts(segments, value))


def log_propagation(
    logps: Tensor,
    reflective: Tensor,
    segments: Segments,
    *,
    gamma: float = 0.5,
    window: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Sum over the reflective tokens k before j of log(1 - (1 - p_k) exp(-gamma (j - k))): `[N]`, each <= 0.

    It penalises a doubtful reflective token more than once, by design.

    Args:
        logps: `[N]`; reflective: bool `[N]`.
        gamma: >= 0, may be infinite. 0: log p_k for every later token.
        window: only j - k <= window; None: all.
        positions: as for `r3_rewards`.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    place = segments.positions if positions is None else positions
    lp, mask = segments.to_padded(logps.detach())
    if math.isinf(gamma) or not segments.total:
        return torch.zeros_like(logps)
    at, _ = segments.to_padded(place.to(lp.dtype))
    starts, which = _starts(reflective.bool(), segments)
    out = torch.zeros_like(lp)
    rows, width = lp.shape
    size = max(1, CHUNK // max(rows * width, 1))
    for first in range(0, starts.shape[1], size):
        k, real = starts[:, first : first + size], which[:, first : first + size]
        d = at[:, None, :] - at.gather(1, k)[:, :, None]
        acts = real[:, :, None] & (d > 0)
        if window is not None:
            acts &= d <= window
        log_P = _log_passed(lp.gather(1, k)[:, :, None], gamma * torch.where(acts, d, 1.0))
        out += torch.where(acts, log_P, 0.0).sum(1)
    return out[mask]


def repeat_for_rollouts(values: Tensor, references: Segments, segments: Segments, group: Tensor) -> Tensor:
    """One value per reference token of each prompt, repeated for its rollouts: `[M] -> [N]`.

    Args:
        references: cuts `[M]` into the G references.
        segments, group: the rollouts, as for `r3_rewards`.
    """
    lengths = references.lengths[group]
    if not torch.equal(lengths, segments.lengths):
        raise ValueError("repeat_for_rollouts: a rollout and its reference differ in their numbers of tokens")
    return values[segments.broadcast(references.offsets[:-1][group]) + segments.positions]


def length_rewards(answer_lengths: Tensor, reference_lengths: Tensor, *, slope: float = 0.5) -> Tensor:
    """1 - slope * | |y| - |answer| | / |y|: `[C]`, in tokens of the answer, never of the reasoning. Not clipped.

    R3 never looks at the sampled answer; this keeps a model from appending to it.

    Args:
        answer_lengths, reference_lengths: `[C]`.
    """
    if bool((reference_lengths <= 0).any()):
        raise ValueError("length_rewards: a reference without tokens has no length to compare with")
    return 1 - slope * (reference_lengths - answer_lengths).abs() / reference_lengths


def share_counts(segments: Segments, share: float) -> Tensor:
    """A share of each completion's tokens, rounded up and at least one: long `[C]`."""
    # 0.07 * 100 is 7.000000000000001 in binary and means 7.
    return (share * segments.lengths.double() - 1e-9).ceil().long().clamp(min=1)


def _effective(weights: Tensor, segments: Segments) -> Tensor:
    """How many tokens share the weight, `[C]`: their number if all weigh alike, 1 if one has it all."""
    squares = segments.sum(weights.square())
    return segments.sum(weights).square() / torch.where(squares > 0, squares, 1.0)


def _slots(segments: Segments, group: Tensor) -> tuple[Tensor, int]:
    """A number per reference token, the same in all rollouts of its group: long `[N]`; and how many there are."""
    groups = int(group.max()) + 1 if group.numel() else 0
    lengths = segments.lengths.new_zeros(groups).scatter_reduce(0, group, segments.lengths, "amax")
    if not torch.equal(lengths[group], segments.lengths):
        raise ValueError("the rollouts of a prompt must be scored on the same reference: their tokens differ in number")
    ends = lengths.cumsum(0)
    return segments.broadcast((ends - lengths)[group]) + segments.positions, int(lengths.sum())


def _log_passed(logp: Tensor, fade: Tensor) -> Tensor:
    """log(1 - (1 - p) exp(-fade)), never above 0, with all digits at both ends.

    Near 1 what is lost is the small number; where p and fade are tiny, p exp(-fade) + (1 - exp(-fade)) is.
    """
    lost = -torch.expm1(logp) * torch.exp(-fade)
    gained = torch.log(-torch.expm1(-fade))  # -inf where fade = 0: nothing is gained
    return torch.where(lost < 0.5, torch.log1p(-lost), torch.logaddexp(logp - fade, gained))


def _starts(reflective: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Columns of the reflective tokens of each completion, padded: long `[C, K]`, and which are real, bool."""
    kept = segments.narrow(reflective)
    return kept.to_padded(segments.positions[reflective])


# ----------------------------------------------------------------------------------------------------
# DRO's two data filters (arXiv 2506.13351 v1, section 4.2): prompts out of reach, and prompts that vary too little.
#
# Run before training and at intervals, with the current policy and 16 or 32 rollouts per prompt, on the reference
# tokens that R3 is made of (`tokengrain.credit.r3`).

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True)
class PromptFilter:
    """Which prompts to keep and why.

    Attributes:
        worst_rank: `[C]`, mean rank of the worst share of the reference's tokens under each rollout.
        best: `[G]`, its least value over the rollouts of the prompt.
        reachable: bool `[G]`, stage 1.
        spread: `[G]`, the largest sigma of the prompt's reference tokens.
        order: long, the reachable prompts by falling spread.
        keep: bool `[G]`, both stages.
    """

    worst_rank: Tensor
    best: Tensor
    reachable: Tensor
    spread: Tensor
    order: Tensor
    keep: Tensor


def filter_prompts(
    logps: Tensor,
    ranks: Tensor,
    segments: Segments,
    group: Tensor,
    *,
    rho: float = 0.1,
    top_k: float = 50,
    drop: float = 0.2,
    ddof: int = 0,
) -> PromptFilter:
    """Both stages.

    Args:
        logps: log-probabilities of the reference tokens under each rollout's reasoning `[N]`.
        ranks: their ranks among the vocabulary, 1 first `[N]`, from `token_ranks`.
        segments: cuts `[N]` into C rollouts; group: long `[C]`.
        rho: share of a reference's tokens, those of the worst ranks, that decide stage 1.
        top_k: a prompt is reachable if their mean rank is at most this under one rollout at least.
        drop: share of the reachable prompts, those of the least spread, that stage 2 drops (rounded down; of equal
            ones the later prompts go).
        ddof: of sigma.
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"drop must lie in [0, 1], got {drop}")
    worst = worst_ranks(ranks, segments, rho)
    groups = int(group.max()) + 1 if group.numel() else 0
    best = worst.new_full((groups,), torch.inf).scatter_reduce(0, group, worst, "amin")
    reachable = best <= top_k
    sigma = variability(logps, segments, group, ddof=ddof)
    spread = sigma.new_zeros(groups).scatter_reduce(0, group[segments.ids], sigma, "amax")
    found = reachable.nonzero().flatten()
    order = found[torch.argsort(spread[found], descending=True, stable=True)]
    keep = torch.zeros_like(reachable)
    keep[order[: len(order) - math.floor(drop * len(order) + 1e-9)]] = True
    return PromptFilter(worst, best, reachable, spread, order, keep)


def worst_ranks(ranks: Tensor, segments: Segments, rho: float) -> Tensor:
    """Mean of the worst share of ranks of each completion, at least one, rounded up: `[N] -> [C]`."""
    if not 0 < rho <= 1:
        raise ValueError(f"rho must lie in (0, 1], got {rho}")
    ranks = ranks.detach() if ranks.is_floating_point() else ranks.double()
    ordered = segments.to_padded(ranks)[0].sort(dim=1, descending=True).values
    count = share_counts(segments, rho)
    taken = torch.arange(ordered.shape[1], device=ordered.device) < count[:, None]
    return torch.where(taken, ordered, 0.0).sum(1) / count


def token_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """1 + the number of vocabulary items with a larger logit than the label: `[N, V], [N] -> long [N]`."""
    return 1 + (logits > logits.gather(1, labels[:, None])).sum(1)


def carry_over(kept: Sequence[Item], previous: Sequence[Item], *, share: float = 0.1, seed: int = 0) -> list[Item]:
    """The prompts of the next round: those that the filter kept, and a random share of the previous round's.

    Args:
        kept, previous: ids of prompts.
        share: of the previous round, rounded down.
        seed: of the draw; another one for each round.

    Returns:
        Without duplicates, the kept ones first.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    drawn = random.Random(seed).sample(list(previous), math.floor(share * len(previous) + 1e-9))
    return list(dict.fromkeys([*kept, *drawn]))


# ----------------------------------------------------------------------------------------------------
# Reference answers after sampled chains of thought: what DRO scores (arXiv 2506.13351).

# Logits that are alive at once while tokens are ranked.
REFERENCES_CHUNK = 1 << 25


def chains_of(batch: TokenBatch, tokenizer: Any, marker: str) -> list[list[int] | None]:
    """The tokens of each completion up to the one that completes `marker`, C lists; None: it has none."""
    stops = StopStrings(tokenizer, [marker])
    found: list[list[int] | None] = []
    for index in range(batch.n_completions):
        ids = batch.completion(index).tolist()
        length = stops.length(ids)
        found.append(None if length is None else ids[:length])
    return found


def references_of(
    batch: TokenBatch, tokenizer: Any, *, column: str = "reference", separator: str = "", end: bool = True
) -> list[list[int]]:
    """Token ids of each prompt's reference answer, G lists.

    The reference is tokenised by itself: no token spans the end of a chain.

    Args:
        column: of the rows: text, or a list of token ids that is taken as it is.
        separator: text between a chain and its answer.
        end: append the end-of-sequence token, as the policy would.

    Raises:
        DataError: a row without a reference, or with an empty one.
        ModelError: `end`, and the tokenizer has no such token.
    """
    if end and tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token to close a reference with; expected one, or end: false"
        )
    references = []
    for number, raw in enumerate(batch.raw):
        given = raw.get(column)
        if isinstance(given, str) and given.strip():
            ids = list(tokenizer(separator + given, add_special_tokens=False)["input_ids"])
            ids += [tokenizer.eos_token_id] if end else []
        elif isinstance(given, Sequence) and given and all(isinstance(i, int) for i in given):
            ids = list(given)
        else:
            raise DataError(
                "no reference answer",
                row=batch.rows[number] if batch.rows else number,
                field=column,
                value=given,
                expected="text, or a list of token ids",
            )
        references.append(ids)
    return references


def reference_batch(
    batch: TokenBatch,
    chains: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    group: Sequence[int] | None = None,
) -> TokenBatch:
    """Each prompt with its chains, each followed by the reference; only the reference's tokens count.

    The prompt is computed once for all its chains. The completions of a group have equally many counted tokens.

    Args:
        batch: for its prompts.
        chains: token ids; references: G lists of token ids.
        group: the prompt of each chain, not decreasing; None: the chains are those of the batch's completions.
    """
    group = batch.group.tolist() if group is None else group
    members: list[list[Completion]] = [[] for _ in references]
    for chain, number in zip(chains, group, strict=True):
        reference = references[number]
        members[number].append(Completion([*chain, *reference], [False] * len(chain) + [True] * len(reference)))
    rows = batch.rows or range(len(references))
    samples = [
        Sample(batch.prompt(number).tolist(), completions, row=row)
        for number, (completions, row) in enumerate(zip(members, rows, strict=True))
    ]
    return TokenBatch.from_samples(samples).to(batch.device)


def reference_logps(scorer: Any, batch: TokenBatch, max_tokens: int | None = None) -> Tensor:
    """Log-probabilities of the reference's tokens `[N]` under a model or a `Reference`, without gradient."""
    return in_parts(batch, max_tokens, lambda part: {"logps": scorer_logps(scorer, part)})["logps"]


def reference_ranks(model: nn.Module, batch: TokenBatch, max_tokens: int | None = None) -> Tensor:
    """Ranks of the reference's tokens among the vocabulary, long `[N]`, 1 first."""
    head = head_of(model)

    def measure(part: TokenBatch) -> dict[str, Tensor]:
        hidden, labels = score(model, part, ("hidden",)).hidden, part.labels
        assert hidden is not None  # it was asked for
        rows = max(1, REFERENCES_CHUNK // head.vocab_size)
        found = [
            token_ranks(head.logits(hidden[i : i + rows]), labels[i : i + rows].to(hidden.device))
            for i in range(0, max(len(labels), 1), rows)
        ]
        return {"ranks": torch.cat(found)}

    with evaluating(model):
        return in_parts(batch, max_tokens, measure)["ranks"]


# ----------------------------------------------------------------------------------------------------
# The credit step of DRO (arXiv 2506.13351): how likely a chain of thought makes the reference answer.

Baseline = Literal["none", "empty", "replaced"]


@rollout_credit("r3", phase="rewards", group=True)
class R3Rewards:
    """The reasoning reflection reward of each completion, from its chain and the row's reference answer.

    A completion is its chain of thought, up to and with `marker`, and an answer. The reference is scored in place of
    the answer, by the current policy or the reference model. A completion without the marker, or cut at the length
    limit, has no reward: it takes no part in its group and gets advantage 0.

    Args:
        tokenizer: of the policy.
        reference: the frozen model, for scorer "reference".
        scorer: which model scores: "policy" or "reference".
        marker: text that ends the chain.
        column: the row's reference answer; separator: text between chain and answer; end: the answer ends with the
            end-of-sequence token.
        truncated: "keep" uses completions that were cut after their chain had ended.
        baseline: subtract the reference's log-probabilities with the chain masked: "empty", by the marker alone,
            which is the same for the whole group and changes nothing but the logs as long as rewards are compared
            within the group; "replaced", token by token by a placeholder, which differs between completions; "none".
        propagation: correct for what a wrong token does to later ones (then without a baseline); gamma, span,
            rule, share: see `Propagation` (its window and value).
        power, threshold, normalize, ddof, floor, min_sigma: see `r3_rewards`.
        weight: factor of R3; length_weight, length_slope: of the reward for an answer as long as the reference.
        combine: "add" to the outcome there is, or "replace" it.
        filter_top_k: leave out prompts whose reference is out of reach: the mean rank of the worst share
            `filter_rho` of its tokens, for the policy, above this under every chain. None: no such filter.
        filter_drop: leave out this share of the prompts, whose reference varies least over the chains. In every
            rollout; the paper does both now and then, on the data.

    Raises:
        RecipeError: a baseline with propagation, or scorer "reference" without one.
    """

    def __init__(
        self,
        *,
        tokenizer: Any,
        reference: Any = None,
        scorer: Literal["policy", "reference"] = "policy",
        marker: str = "</think>",
        column: str = "reference",
        separator: str = "",
        end: bool = True,
        truncated: Literal["drop", "keep"] = "drop",
        baseline: Baseline | None = None,
        propagation: bool = False,
        gamma: NonNegative = 0.5,
        span: int | None = None,
        rule: Rule = "top",
        share: Positive = 0.1,
        power: NonNegative = 1.0,
        threshold: NonNegative = 0.0,
        normalize: Normalise = "sum",
        ddof: Literal[0, 1] = 0,
        floor: Number | None = None,
        min_sigma: NonNegative = 0.0,
        weight: NonNegative = 1.0,
        length_weight: NonNegative = 0.1,
        length_slope: NonNegative = 0.5,
        combine: Literal["add", "replace"] = "add",
        filter_top_k: Positive | None = None,
        filter_rho: Share = 0.1,
        filter_drop: Share = 0.0,
    ) -> None:
        if propagation and baseline not in (None, "none"):
            raise RecipeError(f"credit 'r3': baseline is {baseline!r} and propagation true; expected one of them")
        if scorer == "reference" and reference is None:
            raise RecipeError("credit 'r3': scorer is 'reference', and there is no reference model")
        if not marker:
            raise RecipeError("credit 'r3': marker is empty; expected the text that ends a chain of thought")
        self.tokenizer, self.reference, self.scorer = tokenizer, reference, scorer
        self.marker, self.truncated, self.combine = marker, truncated, combine
        self.reading: dict[str, Any] = {"column": column, "separator": separator, "end": end}
        self.baseline: Baseline = baseline or ("none" if propagation else "empty")
        self.propagation = Propagation(gamma, span, rule, share) if propagation else None
        self.settings: dict[str, Any] = {
            "power": power,
            "threshold": threshold,
            "normalize": normalize,
            "ddof": ddof,
            "floor": floor,
            "min_sigma": min_sigma,
        }
        self.weight, self.length_weight, self.length_slope = weight, length_weight, length_slope
        self.filter_top_k, self.filter_rho, self.filter_drop = filter_top_k, filter_rho, filter_drop
        self.last: R3 | None = None  # of the latest rollout, for inspection

    def __call__(self, step: RolloutStep) -> None:
        if not step.batch.n_completions:
            return
        found = chains_of(step.batch, self.tokenizer, self.marker)
        usable = torch.tensor([c is not None for c in found], device=step.batch.device)
        if self.truncated == "drop":
            usable = usable & ~step.truncated
        chains = [c or [] for c in found]
        references = references_of(step.batch, self.tokenizer, **self.reading)
        scored = reference_batch(step.batch, chains, references)
        logps = self._logps(step, scored)
        self.last = r3_rewards(
            logps,
            scored.segments,
            scored.group,
            usable=usable,
            baseline=self._baseline(step, chains, references, scored),
            propagation=self.propagation,
            **self.settings,
        )
        lengths = self._length_rewards(step, chains, scored)
        rewards = self.weight * self.last.rewards + self.length_weight * lengths
        before = step.rewards if self.combine == "add" else torch.zeros_like(step.rewards)
        step.rewards = before + rewards.to(step.rewards)
        if self.filter_top_k is not None or self.filter_drop:
            self._filter(step, scored, logps, usable)
        self._measure(step, usable, lengths)

    def _logps(self, step: RolloutStep, batch: TokenBatch) -> Tensor:
        scorer = step.model if self.scorer == "policy" else self.reference
        return reference_logps(scorer, batch, step.max_tokens).to(step.batch.device)

    def _baseline(
        self, step: RolloutStep, chains: list[list[int]], references: list[list[int]], scored: TokenBatch
    ) -> Tensor | None:
        """Log-probabilities of the reference's tokens with the chains masked `[N]`."""
        if self.baseline == "none":
            return None
        marker = list(self.tokenizer(self.marker, add_special_tokens=False)["input_ids"])
        if self.baseline == "replaced":
            names = ("mask_token_id", "pad_token_id", "unk_token_id", "eos_token_id")
            ids = [i for i in (getattr(self.tokenizer, name, None) for name in names) if i is not None]
            if not ids:
                raise RecipeError("credit 'r3': baseline 'replaced' needs a mask, pad or end token in the tokenizer")
            masked = [[ids[0]] * max(len(c) - len(marker), 0) + c[max(len(c) - len(marker), 0) :] for c in chains]
            return self._logps(step, reference_batch(step.batch, masked, references))
        alone = reference_batch(step.batch, [marker] * len(references), references, range(len(references)))
        return repeat_for_rollouts(self._logps(step, alone), alone.segments, scored.segments, scored.group)

    def _length_rewards(self, step: RolloutStep, chains: list[list[int]], scored: TokenBatch) -> Tensor:
        answers = step.batch.completion_offsets.diff() - torch.tensor([len(c) for c in chains], device=scored.device)
        if not self.reading["end"]:
            answers = answers - (~step.truncated).long()  # the end token is no part of the reference
        dtype = step.rewards.dtype
        return length_rewards(answers.to(dtype), scored.segments.lengths.to(dtype), slope=self.length_slope)

    def _filter(self, step: RolloutStep, scored: TokenBatch, logps: Tensor, usable: Tensor) -> None:
        """Drop prompts, judged among those of all ranks by their usable completions."""
        tokens = scored.segments.broadcast(usable)
        ranks = torch.ones_like(logps)
        if self.filter_top_k is not None:
            ranks = reference_ranks(step.model, scored, step.max_tokens).to(logps)
        mine = (
            step.batch.n_prompts,
            logps[tokens].tolist(),
            ranks[tokens].tolist(),
            scored.segments.lengths[usable].tolist(),
            scored.group[usable].tolist(),
        )
        parts, own = shares(step, mine)
        firsts = [sum(p[0] for p in parts[:rank]) for rank in range(len(parts))]
        judged = filter_prompts(
            torch.tensor([v for p in parts for v in p[1]]),
            torch.tensor([v for p in parts for v in p[2]]),
            Segments.from_lengths([n for p in parts for n in p[3]]),
            torch.tensor([first + g for first, p in zip(firsts, parts, strict=True) for g in p[4]], dtype=torch.long),
            rho=self.filter_rho,
            # Prompts without a usable chain have rank infinity.
            top_k=torch.finfo(torch.float32).max if self.filter_top_k is None else self.filter_top_k,
            drop=self.filter_drop,
            ddof=self.settings["ddof"],
        )
        keep = torch.zeros(sum(p[0] for p in parts), dtype=torch.bool)
        keep[: len(judged.keep)] = judged.keep
        step.drop(keep[firsts[own] : firsts[own] + mine[0]].to(step.batch.device))
        step.metrics |= {"r3/kept": mean(keep.float()), "r3/reachable": mean(judged.reachable.float())}

    def _measure(self, step: RolloutStep, usable: Tensor, lengths: Tensor) -> None:
        assert self.last is not None  # set in the call
        step.metrics |= {name: mean(values) for name, values in self.last.metrics.items()}
        step.metrics |= {
            "r3/reward": mean(self.last.rewards),
            "r3/usable": mean(usable.float()),
            "r3/length": mean(lengths[usable]),
        }
        if self.last.log_propagation is not None:
            step.metrics["r3/propagation"] = mean(self.last.log_propagation)
