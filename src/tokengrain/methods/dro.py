"""DRO, Direct Reasoning Optimization (arXiv 2506.13351 v1): R3, the reasoning reflection reward.

A completion is a chain of thought and an answer. The *reference* answer is scored in place of its own, token by token.
Reference tokens whose log-probability lp varies over the chains i of a prompt reflect the reasoning, and weigh more:

    σ_j = deviation over i of lp[i, j]    w_j ~ σ_j^power [σ_j >= threshold]    R3_i = Σ_j w_j lp[i, j]

σ measures variability, not relevance: with noise of heavy tails over tokens R3 is worse than the plain mean (power 0).
Two corrections are optional: lp minus that of a masked chain (`baseline`), and for what a doubtful reflective token k
does to those after it (`propagation`): lp_j + Σ_k log(1 - (1 - p_k) exp(-γ (j - k))). Choices that the paper leaves
open are settings; their defaults are ours. The reward belongs to the completion: `group` with eps 1e-4 follows.

In flat vectors `[N]` every completion is the reference after one chain, so that those of a prompt have equally many
tokens; `segments` cuts them into C completions, `group` `[C]` is the prompt of each. No gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tokengrain.batch import Segments, TokenBatch
from tokengrain.data.tokens import StopStrings
from tokengrain.errors import DataError, ModelError, RecipeError, require
from tokengrain.loss import top_tokens
from tokengrain.method import Card, Rollout, rollout_credit
from tokengrain.methods._shaping import GroupStatistics, mean, reduce_groups, shares
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.reference import scorer_logps
from tokengrain.scoring.score import head_of, in_parts, score
from tokengrain.settings import Bounds, NonNegative, Number, Positive, Share

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
CHUNK, LOGITS_CHUNK = 4_000_000, 1 << 25  # numbers held at once by the propagation, and while tokens are ranked


@rollout_credit("r3", phase="rewards", group=True)
@dataclass(kw_only=True)
class R3:
    """The reasoning reflection reward of each completion, from its chain and the row's reference answer.

    A completion without the marker, or cut at the length limit, has no reward: it takes no part in its group and gets
    advantage 0.
    """

    tokenizer: Any  # of the policy
    reference: Any = None  # the frozen model, for scorer "reference"
    scorer: Literal["policy", "reference"] = "policy"  # which model scores
    marker: str = "</think>"  # text that ends the chain
    column: str = "reference"  # the row's reference answer: text, or a list of token ids that is taken as it is
    separator: str = ""  # text between chain and answer
    end: bool = True  # the answer ends with the end-of-sequence token
    truncated: Literal["drop", "keep"] = "drop"  # "keep" uses completions that were cut after their chain had ended
    # Subtract the reference's log-probabilities with the chain masked: "empty", by the marker alone, the same for the
    # whole group, so that as long as rewards are compared within it only the logs change; "replaced", token by token by
    # a placeholder, which differs between completions; "none". None: "empty", or "none" with propagation.
    baseline: Literal["none", "empty", "replaced"] | None = None
    propagation: bool = False  # correct for what a doubtful token does to later ones (then without a baseline)
    gamma: NonNegative = 0.5  # how fast that fades, per token; 0: never
    span: int | None = None  # tokens within which it acts; None: all
    # The reflective tokens, from which it starts: "top": the share of largest σ, rounded up, the earliest among equals;
    # "threshold": σ >= share.
    rule: Rule = "top"
    share: Positive = 0.1
    power: NonNegative = 1.0  # 1: weights go with the deviation, 2: with the variance, 0: the plain mean
    threshold: NonNegative = 0.0  # the deviation below which a token has weight 0, nats
    normalize: Normalise = "sum"  # weights add up to 1 (R3 is a mean, nats per token); "mean": to their number
    ddof: Literal[0, 1] = 0  # of the deviation
    floor: Number | None = None  # least log-probability, since one at -50 swamps all others
    min_sigma: NonNegative = 0.0  # a completion whose largest σ is below it has no reward: what varies is noise
    weight: NonNegative = 1.0  # factor of R3
    # Factor of the reward for an answer as long as the reference, 1 - length_slope | |y| - |answer| | / |y|, which
    # keeps a model from appending to its answers.
    length_weight: NonNegative = 0.1
    length_slope: NonNegative = 0.5
    combine: Literal["add", "replace"] = "add"  # to the outcome there is, or instead of it
    # Leave out prompts whose reference is out of reach: the mean rank of the worst share `filter_rho` of its tokens,
    # for the policy, above this under every chain; and this share of the others, whose reference varies least over the
    # chains. In every rollout; the paper does both now and then, on the data.
    filter_top_k: Positive | None = None
    filter_rho: Annotated[float, Bounds(gt=0, le=1)] = 0.1
    filter_drop: Share = 0.0
    last: Reflection | None = field(default=None, init=False, repr=False)  # of the latest rollout, for inspection

    def __post_init__(self) -> None:
        self.baseline = self.baseline or ("none" if self.propagation else "empty")
        both = f"credit 'r3': baseline is {self.baseline!r} and propagation true; expected one of them"
        require(not self.propagation or self.baseline == "none", RecipeError, both)
        needs_reference = self.scorer == "reference" and self.reference is None
        require(not needs_reference, RecipeError, "credit 'r3': scorer is 'reference', and there is no reference model")
        require(self.marker, RecipeError, "credit 'r3': marker is empty; expected the text that ends a chain")
        possible = self.rule != "top" or self.share <= 1
        require(possible, RecipeError, f"credit 'r3': share is {self.share} of the tokens; expected at most 1")

    def __call__(self, rollout: Rollout) -> None:
        if not rollout.batch.n_completions:
            return
        stops = StopStrings(self.tokenizer, [self.marker])
        completions = [rollout.batch.completion(c).tolist() for c in range(rollout.batch.n_completions)]
        ends = [stops.length(ids) for ids in completions]  # of the chains, None where there is no marker
        chains = [ids[: end or 0] for ids, end in zip(completions, ends, strict=True)]
        usable = torch.tensor([end is not None for end in ends], device=rollout.batch.device)
        if self.truncated == "drop":
            usable = usable & ~rollout.truncated
        references = references_of(rollout.batch, self.tokenizer, self.column, self.separator, self.end)
        scored = rollout.batch.with_endings(chains, references)
        logps = self._logps(rollout, scored)
        baseline = self._masked(rollout, chains, references, scored)
        r3 = self.last = self.reflect(logps, scored.segments, scored.group, usable=usable, baseline=baseline)
        answers = rollout.batch.completion_offsets.diff() - torch.tensor([len(c) for c in chains], device=scored.device)
        if not self.end:
            answers = answers - (~rollout.truncated).long()  # the end token is no part of the reference
        answers, expected = (n.to(rollout.rewards) for n in (answers, scored.segments.lengths))
        lengths = length_rewards(answers, expected, slope=self.length_slope)
        before = rollout.rewards if self.combine == "add" else torch.zeros_like(rollout.rewards)
        rollout.rewards = before + (self.weight * r3.rewards + self.length_weight * lengths).to(rollout.rewards)
        if self.filter_top_k is not None or self.filter_drop:
            self._filter(rollout, scored, logps, usable)
        measures = {**r3.metrics, "r3/reward": r3.rewards, "r3/usable": usable.float(), "r3/length": lengths[usable]}
        if r3.log_propagation is not None:
            measures["r3/propagation"] = r3.log_propagation
        rollout.metrics |= {name: mean(values) for name, values in measures.items()}

    def reflect(
        self,
        logps: Tensor,
        segments: Segments,
        group: Tensor,
        *,
        usable: Tensor | None = None,
        baseline: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Reflection:
        """R3 of every completion, without the length term, from log-probabilities of the reference tokens `[N]`, nats.

        `baseline` `[N]` has those with the chain masked. A completion that is not `usable` (bool `[C]`) has reward NaN
        and no part in σ. `positions` `[N]` are places in the reference, for distances; None: among counted tokens.
        """
        lp = logps.detach()
        lp = lp if self.floor is None else lp.clamp(min=self.floor)
        sigma = variability(lp, segments, group, ddof=self.ddof, usable=usable)
        weights = r3_weights(sigma, segments, power=self.power, threshold=self.threshold, normalize=self.normalize)
        values, reflective, spread = lp, None, None
        if baseline is not None:
            below = baseline.detach()
            values = lp - (below if self.floor is None else below.clamp(min=self.floor))
        if self.propagation:
            reflective = reflective_tokens(sigma, segments, rule=self.rule, share=self.share)
            spread = log_propagation(lp, reflective, segments, gamma=self.gamma, span=self.span, positions=positions)
            values = lp + spread
        # A token of weight 0 adds nothing, whatever its log-probability.
        tokens = torch.where(weights > 0, weights * values, 0.0)
        largest = torch.where(segments.lengths > 0, segments.max(sigma), 0.0)
        left_out = (segments.lengths == 0) | (largest < self.min_sigma)
        if usable is not None:
            left_out = left_out | ~usable.bool()
        rewards = torch.where(left_out, torch.nan, segments.sum(tokens))
        squares = segments.sum(weights.square())
        metrics = {
            "r3/sigma_max": largest,
            "r3/sigma": segments.mean(sigma),
            # How many tokens share the weight: their number if all weigh alike, 1 if one has it all.
            "r3/effective_tokens": segments.sum(weights).square() / torch.where(squares > 0, squares, 1.0),
        }
        return Reflection(rewards, tokens, sigma, weights, reflective, spread, metrics)

    def _logps(self, rollout: Rollout, batch: TokenBatch) -> Tensor:
        scorer = rollout.model if self.scorer == "policy" else self.reference
        measure = lambda part: {"logps": scorer_logps(scorer, part)}  # noqa: E731
        found = in_parts(batch, rollout.max_tokens, measure, rollout.passes)
        return found["logps"].to(rollout.batch.device)

    def _masked(
        self, rollout: Rollout, chains: list[list[int]], references: list[list[int]], scored: TokenBatch
    ) -> Tensor | None:
        """Log-probabilities of the reference's tokens with the chains masked `[N]`; None: no baseline."""
        if self.baseline == "none":
            return None
        marker = list(self.tokenizer(self.marker, add_special_tokens=False)["input_ids"])
        if self.baseline == "empty":
            alone = rollout.batch.with_endings([marker] * len(references), references, range(len(references)))
            starts = alone.segments.offsets[:-1][scored.group]
            return self._logps(rollout, alone)[scored.segments.broadcast(starts) + scored.segments.positions]
        names = ("mask_token_id", "pad_token_id", "unk_token_id", "eos_token_id")
        ids = [i for i in (getattr(self.tokenizer, name, None) for name in names) if i is not None]
        require(ids, RecipeError, "credit 'r3': baseline 'replaced' needs a mask, pad or end token in the tokenizer")
        cuts = [max(len(c) - len(marker), 0) for c in chains]
        masked = [[ids[0]] * cut + c[cut:] for c, cut in zip(chains, cuts, strict=True)]
        return self._logps(rollout, rollout.batch.with_endings(masked, references))

    def _filter(self, rollout: Rollout, scored: TokenBatch, logps: Tensor, usable: Tensor) -> None:
        """Drop prompts, judged among those of all ranks by their usable completions."""
        tokens = scored.segments.broadcast(usable)
        ranks = torch.ones_like(logps)
        if self.filter_top_k is not None:
            ranks = reference_ranks(rollout.model, scored, rollout.max_tokens, rollout.passes).to(logps)
        lengths, group = scored.segments.lengths[usable].tolist(), scored.group[usable].tolist()
        mine = (rollout.batch.n_prompts, logps[tokens].tolist(), ranks[tokens].tolist(), lengths, group)
        parts, own = shares(rollout, mine)
        firsts = [sum(p[0] for p in parts[:rank]) for rank in range(len(parts))]
        all_logps, all_ranks, all_lengths = ([v for p in parts for v in p[i]] for i in (1, 2, 3))
        all_groups = [first + g for first, p in zip(firsts, parts, strict=True) for g in p[4]]
        top_k = torch.finfo(torch.float32).max if self.filter_top_k is None else self.filter_top_k
        settings: Any = {"rho": self.filter_rho, "top_k": top_k, "drop": self.filter_drop, "ddof": self.ddof}
        where = Segments.from_lengths(all_lengths), torch.tensor(all_groups, dtype=torch.long)
        # Prompts without a usable chain have rank infinity.
        judged = filter_prompts(torch.tensor(all_logps), torch.tensor(all_ranks), *where, **settings)
        keep = torch.zeros(sum(p[0] for p in parts), dtype=torch.bool)
        keep[: len(judged.keep)] = judged.keep
        rollout.drop(keep[firsts[own] : firsts[own] + mine[0]].to(rollout.batch.device))
        rollout.metrics |= {"r3/kept": mean(keep.float()), "r3/reachable": mean(judged.reachable.float())}


class Reflection(NamedTuple):
    """Rewards and what they come from."""

    rewards: Tensor  # [C]; NaN for completions that are left out
    tokens: Tensor  # [N], what every reference token adds to the reward
    sigma: Tensor  # [N], equal for all completions of a group, as are weights
    weights: Tensor
    reflective: Tensor | None  # bool [N], the tokens that propagation starts from; None without
    log_propagation: Tensor | None  # [N], what it adds to the log-probabilities, <= 0; None without
    metrics: dict[str, Tensor]  # [C] each


# The formula: σ, w, and the propagation.


def variability(
    logps: Tensor, segments: Segments, group: Tensor, *, ddof: int = 0, usable: Tensor | None = None
) -> Tensor:
    """σ of each reference token `[N]`, the same in a group; 0 with fewer than two usable, or where all are equal."""
    lengths = reduce_groups(segments.lengths, group, 0, "amax")
    differ = "the rollouts of a prompt must be scored on the same reference: their tokens differ in number"
    require(torch.equal(lengths[group], segments.lengths), ValueError, differ)
    # A number per reference token, the same in all completions of its group.
    slot = segments.broadcast((lengths.cumsum(0) - lengths)[group]) + segments.positions
    lp = logps.detach()
    known = lp if usable is None else torch.where(segments.broadcast(usable.bool()), lp, torch.nan)
    return GroupStatistics(known, slot, ddof).std[slot]


def r3_weights(
    sigma: Tensor, segments: Segments, *, power: float = 1.0, threshold: float = 0.0, normalize: Normalise = "sum"
) -> Tensor:
    """Weights from deviations, `[N]`; uniform where all (nearly) vanish and normalisation would divide by 0."""
    w = torch.where(sigma >= threshold, sigma**power, 0.0)
    if normalize == "none":
        return w
    total, length = segments.sum(w), segments.lengths.to(w.dtype)
    flat = segments.broadcast(total <= 1e-12 * length)
    share = torch.where(flat, 1 / segments.broadcast(length), w / segments.broadcast(torch.where(total > 0, total, 1)))
    return share if normalize == "sum" else share * segments.broadcast(length)


def reflective_tokens(sigma: Tensor, segments: Segments, *, rule: Rule, share: float) -> Tensor:
    """The tokens that reflect the reasoning, bool `[N]`; how they are chosen is not specified in the paper."""
    return sigma >= share if rule == "threshold" else top_tokens(sigma, segments, share_counts(segments, share))


def log_propagation(
    logps: Tensor,
    reflective: Tensor,
    segments: Segments,
    *,
    gamma: float,
    span: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Σ over the reflective tokens k before j of log(1 - (1 - p_k) exp(-γ (j - k))): `[N]`, each <= 0.

    It penalises a doubtful reflective token more than once, by design. An infinite γ gives 0.
    """
    lp, mask = segments.to_padded(logps.detach())
    if math.isinf(gamma) or not segments.total:
        return torch.zeros_like(logps)
    at, _ = segments.to_padded((segments.positions if positions is None else positions).to(lp.dtype))
    # Columns of the reflective tokens of each completion, padded, long `[C, K]`, and which are real.
    starts, which = segments.narrow(reflective.bool()).to_padded(segments.positions[reflective.bool()])
    out = torch.zeros_like(lp)
    size = max(1, CHUNK // max(lp.numel(), 1))
    for first in range(0, starts.shape[1], size):
        k, real = starts[:, first : first + size], which[:, first : first + size]
        d = at[:, None, :] - at.gather(1, k)[:, :, None]
        acts = real[:, :, None] & (d > 0)
        if span is not None:
            acts &= d <= span
        log_P = _log_passed(lp.gather(1, k)[:, :, None], gamma * torch.where(acts, d, 1.0))
        out += torch.where(acts, log_P, 0.0).sum(1)
    return out[mask]


def _log_passed(logp: Tensor, fade: Tensor) -> Tensor:
    """log(1 - (1 - p) exp(-fade)), never above 0, with all digits at both ends."""
    # Near 1 what is lost is the small number; where p and fade are tiny, p exp(-fade) + (1 - exp(-fade)) is.
    lost = -torch.expm1(logp) * torch.exp(-fade)
    gained = torch.log(-torch.expm1(-fade))  # -inf where fade = 0: nothing is gained
    return torch.where(lost < 0.5, torch.log1p(-lost), torch.logaddexp(logp - fade, gained))


def length_rewards(answer_lengths: Tensor, reference_lengths: Tensor, *, slope: float) -> Tensor:
    """1 - slope * | |y| - |answer| | / |y|: `[C]`, in tokens of the answer, never of the reasoning. Not clipped."""
    return 1 - slope * (reference_lengths - answer_lengths).abs() / reference_lengths


def share_counts(segments: Segments, share: float) -> Tensor:
    """A share of each completion's tokens, rounded up and at least one: long `[C]`."""
    # 0.07 * 100 is 7.000000000000001 in binary and means 7.
    return (share * segments.lengths.double() - 1e-9).ceil().long().clamp(min=1)


# The two filters (section 4.2): prompts out of reach, and prompts that vary too little.


class PromptFilter(NamedTuple):
    """Which prompts to keep and why: `[G]` each, but for the first and `order`."""

    worst_rank: Tensor  # [C], mean rank of the worst share of the reference's tokens under each chain
    best: Tensor  # its least value over the chains of the prompt
    reachable: Tensor  # bool, stage 1
    spread: Tensor  # the largest σ of the prompt's reference tokens
    order: Tensor  # long, the reachable prompts by falling spread
    keep: Tensor  # bool, both stages


def filter_prompts(
    logps: Tensor, ranks: Tensor, segments: Segments, group: Tensor, *, rho: float, top_k: float, drop: float, ddof: int
) -> PromptFilter:
    """Both stages, from log-probabilities and ranks (1 first) of the reference tokens `[N]`; see `R3`.

    Of the reachable prompts the share `drop` of the least spread goes, rounded down; of equal ones the later prompts.
    """
    worst = worst_ranks(ranks, segments, rho)
    best = reduce_groups(worst, group, torch.inf, "amin")
    reachable = best <= top_k
    sigma = variability(logps, segments, group, ddof=ddof)
    spread = best.new_zeros(best.shape, dtype=sigma.dtype).scatter_reduce(0, group[segments.ids], sigma, "amax")
    found = reachable.nonzero().flatten()
    order = found[torch.argsort(spread[found], descending=True, stable=True)]
    keep = torch.zeros_like(reachable)
    keep[order[: len(order) - math.floor(drop * len(order) + 1e-9)]] = True
    return PromptFilter(worst, best, reachable, spread, order, keep)


def worst_ranks(ranks: Tensor, segments: Segments, rho: float) -> Tensor:
    """Mean of the worst share of ranks of each completion, at least one, rounded up: `[N] -> [C]`."""
    ranks = ranks.detach() if ranks.is_floating_point() else ranks.double()
    count = share_counts(segments, rho)
    return segments.sum(torch.where(top_tokens(ranks, segments, count), ranks, 0.0)) / count


def token_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """1 + the number of vocabulary items with a larger logit than the label: `[N, V], [N] -> long [N]`."""
    return 1 + (logits > logits.gather(1, labels[:, None])).sum(1)


# Reference answers after sampled chains of thought.


def references_of(batch: TokenBatch, tokenizer: Any, column: str, separator: str, end: bool) -> list[list[int]]:
    """Token ids of each prompt's reference answer, G lists; tokenised alone: no token spans the end of a chain."""
    closing = "the tokenizer has no end-of-sequence token to close a reference with; expected one, or end: false"
    require(not end or tokenizer.eos_token_id is not None, ModelError, closing)
    references = []
    for number, raw in enumerate(batch.raw):
        given, ids = raw.get(column), []
        if isinstance(given, str) and given.strip():
            ids = list(tokenizer(separator + given, add_special_tokens=False)["input_ids"])
            ids += [tokenizer.eos_token_id] if end else []
        elif isinstance(given, Sequence) and all(isinstance(i, int) for i in given):
            ids = list(given)
        row, expected = batch.row(number), "text, or a list of token ids"
        require(ids, DataError, "no reference answer", row=row, field=column, value=given, expected=expected)
        references.append(ids)
    return references


def reference_ranks(
    model: nn.Module,
    batch: TokenBatch,
    max_tokens: int | None = None,
    passes: Callable[[int], int] | None = None,
) -> Tensor:
    """Ranks of the reference's tokens among the vocabulary, long `[N]`, 1 first."""
    head = head_of(model)

    def measure(part: TokenBatch) -> dict[str, Tensor]:
        hidden, labels = score(model, part, ("hidden",)).hidden, part.labels
        assert hidden is not None  # it was asked for
        rows = max(1, LOGITS_CHUNK // head.vocab_size)
        parts = zip(hidden.split(rows), labels.to(hidden.device).split(rows), strict=True)
        return {"ranks": torch.cat([token_ranks(head.logits(h), y) for h, y in parts])}

    with evaluating(model):
        return in_parts(batch, max_tokens, measure, passes)["ranks"]
