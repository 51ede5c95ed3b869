"""DRO, Direct Reasoning Optimization (arXiv 2506.13351 v1): R3, the reasoning reflection reward.

A completion is a chain of thought and an answer. The *reference* answer is scored in place of its own, token by token.
Reference tokens whose log-probability lp varies over the chains i of a prompt reflect the reasoning, and weigh more:

    σ_j = deviation over i of lp[i, j]    w_j ~ σ_j^power [σ_j >= threshold]    R3_i = Σ_j w_j lp[i, j]

σ measures variability, not relevance: with noise of heavy tails over tokens R3 is worse than the plain mean (power 0).
Two corrections are optional: lp minus that of a masked chain (`baseline`), and for what a doubtful reflective token k
does to those after it (`propagation`): lp_j + Σ_k log(1 - (1 - p_k) exp(-γ (j - k))). Choices that the paper leaves
open are settings; their defaults are ours. Nothing here carries gradient.

Shapes: in flat vectors `[N]` every completion is the reference after one chain, so that the completions of a group
have equally many tokens; `segments` cuts them into C completions, `group` `[C]` is the prompt of each. A reward belongs
to the completion; the group's advantages of it (`group` with eps 1e-4) go to its own tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from tokengrain.batch import Completion, Sample, Segments, TokenBatch
from tokengrain.data.tokens import StopStrings
from tokengrain.errors import DataError, ModelError, RecipeError, require
from tokengrain.loss import top_tokens
from tokengrain.method import Card, RolloutStep, rollout_credit
from tokengrain.methods._rollout import mean, shares
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
CHUNK = 4_000_000  # elements held at once by the propagation
LOGITS_CHUNK = 1 << 25  # logits held at once while tokens are ranked


@rollout_credit("r3", phase="rewards", group=True)
@dataclass(kw_only=True)
class R3:
    """The reasoning reflection reward of each completion, from its chain and the row's reference answer.

    A completion without the marker, or cut at the length limit, has no reward: it takes no part in its group and gets
    advantage 0.

    Args:
        tokenizer: of the policy.
        reference: the frozen model, for scorer "reference".
        scorer: which model scores: "policy" or "reference".
        marker: text that ends the chain.
        column: the row's reference answer: text, or a list of token ids that is taken as it is.
        separator: text between chain and answer; end: the answer ends with the end-of-sequence token.
        truncated: "keep" uses completions that were cut after their chain had ended.
        baseline: subtract the reference's log-probabilities with the chain masked: "empty", by the marker alone,
            which is the same for the whole group and changes nothing but the logs as long as rewards are compared
            within the group; "replaced", token by token by a placeholder, which differs between completions; "none".
            None: "empty", or "none" with propagation.
        propagation: correct for what a doubtful token does to later ones (then without a baseline).
        gamma: how fast that fades, per token; 0: never.
        span: tokens within which it acts; None: all.
        rule, share: the reflective tokens, from which it starts: "top": the share of largest σ, rounded up, the
            earliest among equals; "threshold": σ >= share.
        power: 1: weights go with the deviation, 2: with the variance, 0: the plain mean.
        threshold: the deviation below which a token has weight 0, nats.
        normalize: "sum": weights add up to 1 (R3 is a mean, nats per token), "mean": to their number, "none".
        ddof: of the deviation.
        floor: least log-probability, since one at -50 swamps all others; None: none.
        min_sigma: a completion whose largest σ is below it has no reward: what varies is noise.
        weight: factor of R3; length_weight: of the reward for an answer as long as the reference,
            1 - length_slope | |y| - |answer| | / |y|, which keeps a model from appending to its answers.
        combine: "add" to the outcome there is, or "replace" it.
        filter_top_k: leave out prompts whose reference is out of reach: the mean rank of the worst share
            `filter_rho` of its tokens, for the policy, above this under every chain. None: no such filter.
        filter_drop: leave out this share of the prompts, whose reference varies least over the chains. In every
            rollout; the paper does both now and then, on the data.
    """

    tokenizer: Any
    reference: Any = None
    scorer: Literal["policy", "reference"] = "policy"
    marker: str = "</think>"
    column: str = "reference"
    separator: str = ""
    end: bool = True
    truncated: Literal["drop", "keep"] = "drop"
    baseline: Literal["none", "empty", "replaced"] | None = None
    propagation: bool = False
    gamma: NonNegative = 0.5
    span: int | None = None
    rule: Rule = "top"
    share: Positive = 0.1
    power: NonNegative = 1.0
    threshold: NonNegative = 0.0
    normalize: Normalise = "sum"
    ddof: Literal[0, 1] = 0
    floor: Number | None = None
    min_sigma: NonNegative = 0.0
    weight: NonNegative = 1.0
    length_weight: NonNegative = 0.1
    length_slope: NonNegative = 0.5
    combine: Literal["add", "replace"] = "add"
    filter_top_k: Positive | None = None
    filter_rho: Annotated[float, Bounds(gt=0, le=1)] = 0.1
    filter_drop: Share = 0.0
    last: Reflection | None = field(default=None, init=False, repr=False)  # of the latest rollout, for inspection

    def __post_init__(self) -> None:
        self.baseline = self.baseline or ("none" if self.propagation else "empty")
        if self.propagation and self.baseline != "none":
            raise RecipeError(f"credit 'r3': baseline is {self.baseline!r} and propagation true; expected one of them")
        needs_reference = self.scorer == "reference" and self.reference is None
        require(not needs_reference, RecipeError, "credit 'r3': scorer is 'reference', and there is no reference model")
        require(
            self.marker, RecipeError, "credit 'r3': marker is empty; expected the text that ends a chain of thought"
        )
        if self.rule == "top" and self.share > 1:
            raise RecipeError(f"credit 'r3': share is {self.share} of the tokens; expected at most 1")

    def __call__(self, step: RolloutStep) -> None:
        if not step.batch.n_completions:
            return
        found = chains_of(step.batch, self.tokenizer, self.marker)
        usable = torch.tensor([c is not None for c in found], device=step.batch.device)
        if self.truncated == "drop":
            usable = usable & ~step.truncated
        chains = [c or [] for c in found]
        references = references_of(step.batch, self.tokenizer, self.column, self.separator, self.end)
        scored = reference_batch(step.batch, chains, references)
        logps = self._logps(step, scored)
        baseline = self._masked(step, chains, references, scored)
        r3 = self.last = self.reflect(logps, scored.segments, scored.group, usable=usable, baseline=baseline)
        lengths = self._length_rewards(step, chains, scored)
        before = step.rewards if self.combine == "add" else torch.zeros_like(step.rewards)
        step.rewards = before + (self.weight * r3.rewards + self.length_weight * lengths).to(step.rewards)
        if self.filter_top_k is not None or self.filter_drop:
            self._filter(step, scored, logps, usable)
        step.metrics |= {name: mean(values) for name, values in r3.metrics.items()}
        step.metrics |= {
            "r3/reward": mean(r3.rewards),
            "r3/usable": mean(usable.float()),
            "r3/length": mean(lengths[usable]),
        }
        if r3.log_propagation is not None:
            step.metrics["r3/propagation"] = mean(r3.log_propagation)

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
        """R3 of every completion, without the length term.

        Args:
            logps: log-probabilities of the reference tokens after each chain `[N]`, nats.
            segments, group: see the module's text.
            usable: bool `[C]`; a completion that is not has reward NaN and no part in σ. None: all are.
            baseline: the same log-probabilities with the chain masked `[N]`, subtracted.
            positions: place of every token in the reference, for distances `[N]`; None: that among counted tokens.
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

    def _logps(self, step: RolloutStep, batch: TokenBatch) -> Tensor:
        scorer = step.model if self.scorer == "policy" else self.reference
        found = in_parts(batch, step.max_tokens, lambda part: {"logps": scorer_logps(scorer, part)})
        return found["logps"].to(step.batch.device)

    def _masked(
        self, step: RolloutStep, chains: list[list[int]], references: list[list[int]], scored: TokenBatch
    ) -> Tensor | None:
        """Log-probabilities of the reference's tokens with the chains masked `[N]`; None: no baseline."""
        if self.baseline == "none":
            return None
        marker = list(self.tokenizer(self.marker, add_special_tokens=False)["input_ids"])
        if self.baseline == "empty":
            alone = reference_batch(step.batch, [marker] * len(references), references, range(len(references)))
            return repeat_for_rollouts(self._logps(step, alone), alone.segments, scored.segments, scored.group)
        names = ("mask_token_id", "pad_token_id", "unk_token_id", "eos_token_id")
        ids = [i for i in (getattr(self.tokenizer, name, None) for name in names) if i is not None]
        require(ids, RecipeError, "credit 'r3': baseline 'replaced' needs a mask, pad or end token in the tokenizer")
        cuts = [max(len(c) - len(marker), 0) for c in chains]
        masked = [[ids[0]] * cut + c[cut:] for c, cut in zip(chains, cuts, strict=True)]
        return self._logps(step, reference_batch(step.batch, masked, references))

    def _length_rewards(self, step: RolloutStep, chains: list[list[int]], scored: TokenBatch) -> Tensor:
        answers = step.batch.completion_offsets.diff() - torch.tensor([len(c) for c in chains], device=scored.device)
        if not self.end:
            answers = answers - (~step.truncated).long()  # the end token is no part of the reference
        dtype = step.rewards.dtype
        return length_rewards(answers.to(dtype), scored.segments.lengths.to(dtype), slope=self.length_slope)

    def _filter(self, step: RolloutStep, scored: TokenBatch, logps: Tensor, usable: Tensor) -> None:
        """Drop prompts, judged among those of all ranks by their usable completions."""
        tokens = scored.segments.broadcast(usable)
        ranks = torch.ones_like(logps)
        if self.filter_top_k is not None:
            ranks = reference_ranks(step.model, scored, step.max_tokens).to(logps)
        lengths, group = scored.segments.lengths[usable].tolist(), scored.group[usable].tolist()
        mine = (step.batch.n_prompts, logps[tokens].tolist(), ranks[tokens].tolist(), lengths, group)
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
            ddof=self.ddof,
        )
        keep = torch.zeros(sum(p[0] for p in parts), dtype=torch.bool)
        keep[: len(judged.keep)] = judged.keep
        step.drop(keep[firsts[own] : firsts[own] + mine[0]].to(step.batch.device))
        step.metrics |= {"r3/kept": mean(keep.float()), "r3/reachable": mean(judged.reachable.float())}


@dataclass(frozen=True)
class Reflection:
    """Rewards and what they come from.

    Attributes:
        rewards: `[C]`; NaN for completions that are left out.
        tokens: `[N]`, what every reference token adds to the reward.
        sigma, weights: `[N]`, equal for all completions of a group.
        reflective: bool `[N]`, the tokens that propagation starts from; None without.
        log_propagation: `[N]`, what it adds to the log-probabilities, <= 0; None without.
        metrics: `[C]` each.
    """

    rewards: Tensor
    tokens: Tensor
    sigma: Tensor
    weights: Tensor
    reflective: Tensor | None
    log_propagation: Tensor | None
    metrics: dict[str, Tensor]


# The formula: σ, w, and the propagation.


def variability(
    logps: Tensor, segments: Segments, group: Tensor, *, ddof: int = 0, usable: Tensor | None = None
) -> Tensor:
    """σ: standard deviation of each reference token's log-probability over the completions of its group, `[N]`.

    Equal for all completions of a group; 0 where fewer than two are usable, and exactly 0 where all are equal.

    Raises:
        ValueError: completions of one group with different numbers of tokens: they are not the same reference.
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
    # Masked before the square: a completion that is left out may hold anything, infinities included.
    squares = total(torch.where(keep, lp - mean, 0.0).square())
    variance = squares / (count - ddof).clamp(min=1)
    return torch.where((high > low) & (count > ddof), variance, 0.0).sqrt()[slot]


def _slots(segments: Segments, group: Tensor) -> tuple[Tensor, int]:
    """A number per reference token, the same in all completions of its group: long `[N]`; and how many there are."""
    groups = int(group.max()) + 1 if group.numel() else 0
    lengths = segments.lengths.new_zeros(groups).scatter_reduce(0, group, segments.lengths, "amax")
    if not torch.equal(lengths[group], segments.lengths):
        raise ValueError("the rollouts of a prompt must be scored on the same reference: their tokens differ in number")
    ends = lengths.cumsum(0)
    return segments.broadcast((ends - lengths)[group]) + segments.positions, int(lengths.sum())


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
    if rule == "threshold":
        return sigma >= share
    return top_tokens(sigma, segments, share_counts(segments, share))


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
    """log(1 - (1 - p) exp(-fade)), never above 0, with all digits at both ends.

    Near 1 what is lost is the small number; where p and fade are tiny, p exp(-fade) + (1 - exp(-fade)) is.
    """
    lost = -torch.expm1(logp) * torch.exp(-fade)
    gained = torch.log(-torch.expm1(-fade))  # -inf where fade = 0: nothing is gained
    return torch.where(lost < 0.5, torch.log1p(-lost), torch.logaddexp(logp - fade, gained))


def repeat_for_rollouts(values: Tensor, references: Segments, segments: Segments, group: Tensor) -> Tensor:
    """One value per token of the G `references`, repeated for the completions of each: `[M] -> [N]`."""
    return values[segments.broadcast(references.offsets[:-1][group]) + segments.positions]


def length_rewards(answer_lengths: Tensor, reference_lengths: Tensor, *, slope: float) -> Tensor:
    """1 - slope * | |y| - |answer| | / |y|: `[C]`, in tokens of the answer, never of the reasoning. Not clipped."""
    return 1 - slope * (reference_lengths - answer_lengths).abs() / reference_lengths


def share_counts(segments: Segments, share: float) -> Tensor:
    """A share of each completion's tokens, rounded up and at least one: long `[C]`."""
    # 0.07 * 100 is 7.000000000000001 in binary and means 7.
    return (share * segments.lengths.double() - 1e-9).ceil().long().clamp(min=1)


# The two filters (section 4.2): prompts out of reach, and prompts that vary too little.


@dataclass(frozen=True)
class PromptFilter:
    """Which prompts to keep and why.

    Attributes:
        worst_rank: `[C]`, mean rank of the worst share of the reference's tokens under each chain.
        best: `[G]`, its least value over the chains of the prompt.
        reachable: bool `[G]`, stage 1.
        spread: `[G]`, the largest σ of the prompt's reference tokens.
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
    rho: float,
    top_k: float,
    drop: float,
    ddof: int = 0,
) -> PromptFilter:
    """Both stages. Of the reachable prompts the share `drop` of the least spread goes, rounded down; of equal ones
    the later prompts.

    Args:
        logps: `[N]`; ranks: of the reference tokens among the vocabulary, 1 first `[N]`.
    """
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
    ranks = ranks.detach() if ranks.is_floating_point() else ranks.double()
    ordered = segments.to_padded(ranks)[0].sort(dim=1, descending=True).values
    count = share_counts(segments, rho)
    taken = torch.arange(ordered.shape[1], device=ordered.device) < count[:, None]
    return torch.where(taken, ordered, 0.0).sum(1) / count


def token_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """1 + the number of vocabulary items with a larger logit than the label: `[N, V], [N] -> long [N]`."""
    return 1 + (logits > logits.gather(1, labels[:, None])).sum(1)


# Reference answers after sampled chains of thought.


def chains_of(batch: TokenBatch, tokenizer: Any, marker: str) -> list[list[int] | None]:
    """The tokens of each completion up to the one that completes `marker`, C lists; None: it has none."""
    stops = StopStrings(tokenizer, [marker])
    ids = [batch.completion(index).tolist() for index in range(batch.n_completions)]
    return [None if (length := stops.length(i)) is None else i[:length] for i in ids]


def references_of(batch: TokenBatch, tokenizer: Any, column: str, separator: str, end: bool) -> list[list[int]]:
    """Token ids of each prompt's reference answer, G lists; see `R3`.

    The reference is tokenised by itself: no token spans the end of a chain.

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
        given, ids = raw.get(column), []
        if isinstance(given, str) and given.strip():
            ids = list(tokenizer(separator + given, add_special_tokens=False)["input_ids"])
            ids += [tokenizer.eos_token_id] if end else []
        elif isinstance(given, Sequence) and all(isinstance(i, int) for i in given):
            ids = list(given)
        if not ids:
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
    """The batch's prompts, each once with all its chains, each followed by the reference, whose tokens alone count.

    Args:
        chains: token ids; references: G lists of token ids.
        group: the prompt of each chain, not decreasing; None: the chains are those of the batch's completions.
    """
    members: list[list[Completion]] = [[] for _ in references]
    for chain, number in zip(chains, batch.group.tolist() if group is None else group, strict=True):
        reference = references[number]
        members[number].append(Completion([*chain, *reference], [False] * len(chain) + [True] * len(reference)))
    rows = batch.rows or range(len(references))
    samples = [
        Sample(batch.prompt(number).tolist(), completions, row=row)
        for number, (completions, row) in enumerate(zip(members, rows, strict=True))
    ]
    return TokenBatch.from_samples(samples).to(batch.device)


def reference_ranks(model: nn.Module, batch: TokenBatch, max_tokens: int | None = None) -> Tensor:
    """Ranks of the reference's tokens among the vocabulary, long `[N]`, 1 first."""
    head = head_of(model)

    def measure(part: TokenBatch) -> dict[str, Tensor]:
        hidden, labels = score(model, part, ("hidden",)).hidden, part.labels
        assert hidden is not None  # it was asked for
        rows = max(1, LOGITS_CHUNK // head.vocab_size)
        found = [
            token_ranks(head.logits(hidden[i : i + rows]), labels[i : i + rows].to(hidden.device))
            for i in range(0, max(len(labels), 1), rows)
        ]
        return {"ranks": torch.cat(found)}

    with evaluating(model):
        return in_parts(batch, max_tokens, measure)["ranks"]
