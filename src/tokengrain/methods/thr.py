"""THR, Token Hidden Reward (arXiv 2510.03669), and its predecessor NTHR (arXiv 2505.18830).

A token's influence is the inner product, over the weights W of the language-model head, of the gradient of its
log-probability with the gradient of the log-likelihood of its group's correct completions: what training on
the token does, to first order, to the correct ones. With h the head's input and e = onehot(y) - softmax(W h),

    influence[t] = sum_a w_a <e_a, e_t> <h_a, h_t> = e_t^T M h_t,    M = sum_a w_a e_a h_a^T,    [V, H]

over the tokens a of the correct completions, w_a = 1 / (tokens of a's completion) for THR and 1 for NTHR. No pair
of tokens is visited one by one: either M is built once per group and contracted with every token, which is
linear in the tokens, or, where there are few of them, the two matrices of inner products are multiplied element
by element. Both are exact; the one with fewer products is taken.

`restricted` keeps only the columns of the vocabulary that occur in the group, with the probabilities of the whole
softmax: hundreds of columns instead of the vocabulary, at the price of the part of <e_a, e_t> from tokens that
occur nowhere in the group. Nothing here carries gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RunError
from tokengrain.method import Card, Phase, RolloutStep, Stateless, rollout_credit
from tokengrain.methods._rollout import mean
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Head, accumulation_dtype
from tokengrain.settings import Bounds, Number, Share

CARD = Card(
    "thr",
    "THR",
    "tokens that help correct answers",
    "Token Hidden Reward: Steering Exploration-Exploitation in Group Relative Deep Reinforcement Learning",
    "2510.03669",
    "ICLR 2026",
    trains="policy, online",
    credit="influence of a token on the group's correct completions",
    objective="grpo",
)

# Prediction errors [tokens of a group, columns], and inner products of tokens, alive at once, in bytes.
CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Influence:
    """What every token does to the correct completions of its group.

    Attributes:
        values: `[N]`, float32 (float64 for float64 hidden states); 0 in groups that were left out.
        logps: log-probabilities of the labels `[N]`, nats: those given, or a by-product, so that the pass for the
            old log-probabilities need not project the hidden states itself.
    """

    values: Tensor
    logps: Tensor


@torch.no_grad()
def correct_influence(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    segments: Segments,
    group: Tensor,
    correct: Tensor,
    *,
    length_normalize: bool = True,
    exclude_self: bool = False,
    restricted: bool = False,
    logps: Tensor | None = None,
    temperature: float = 1.0,
    only_mixed: bool = True,
) -> Influence:
    """Influence of every token on the log-likelihood of the correct completions of its group.

    Args:
        hidden: `[N, H]`, the head's input at the positions that predict the labels, under the old policy.
        head: the old policy's head. Its scale, and the slope of its soft cap, are left out of the gradients:
            <e, e'> <h, h'> as the papers write it.
        labels: long `[N]`.
        segments: cuts `[N]` into C completions.
        group: long `[C]`, the prompt of each.
        correct: `[C]`, whether the completion is right (0/1 or bool).
        length_normalize: weigh the tokens of each correct completion by 1 / their number (THR; NTHR does not).
        exclude_self: leave a token's own completion out of the sum.
        restricted: only the columns of token ids that occur in the group.
        logps: log-probabilities of the labels `[N]` if known; `restricted` then needs no product with the whole head.
        temperature: divides the logits, as it does for the old log-probabilities.
        only_mixed: leave out groups that are not mixed; their tokens have weight 1 whatever their influence.
    """
    softcap = None if head.softcap is None else head.softcap / temperature
    head = replace(head.detach(), scale=head.scale / temperature, softcap=softcap)
    dtype = accumulation_dtype(hidden.dtype)
    groups = mixed_groups(segments, group, correct) if only_mixed else _anchored(segments, group, correct)
    token_group, right = group[segments.ids], correct.bool()[segments.ids]
    lengths = segments.lengths.clamp(min=1).to(dtype)
    weights = segments.broadcast(1 / lengths if length_normalize else torch.ones_like(lengths))
    values = torch.zeros_like(weights)
    known = torch.zeros_like(weights) if logps is None else logps.to(dtype)
    for g in groups.nonzero().flatten().tolist():
        own = token_group == g
        anchors = (own & right).nonzero().flatten()
        rows = torch.cat([anchors, (own & ~right).nonzero().flatten()])
        part = _Group(hidden[rows], head, labels[rows], weights[anchors], segments.ids[anchors], exclude_self)
        values[rows], known[rows] = part.influence(restricted, None if logps is None else known[rows])
    rest = ~groups[token_group]
    if logps is None and bool(rest.any()):
        known[rest] = head_quantities(hidden[rest], head, labels[rest], ("logps",))["logps"]
    return Influence(values, known)


def mixed_groups(segments: Segments, group: Tensor, correct: Tensor) -> Tensor:
    """Groups with a correct completion that has tokens, and with an incorrect one, bool `[G]`."""
    wrong = torch.bincount(group, weights=(~correct.bool()).double()) > 0
    return _anchored(segments, group, correct) & wrong


def _anchored(segments: Segments, group: Tensor, correct: Tensor) -> Tensor:
    """Groups with a correct completion that has tokens, bool `[G]`."""
    return torch.bincount(group, weights=(correct.bool() & (segments.lengths > 0)).double()) > 0


def token_hidden_rewards(influence: Tensor, segments: Segments, correct: Tensor) -> Tensor:
    """THR `[N]`: the influence with its sign turned for tokens of incorrect completions, which are pushed down."""
    sign = 2 * correct.to(influence.dtype) - 1
    return influence * segments.broadcast(sign)


def influence_threshold(
    values: Tensor,
    segments: Segments,
    group: Tensor,
    correct: Tensor,
    *,
    beta: float = 1.0,
    quantile: float | None = None,
) -> Tensor:
    """tau `[G]`: above it a token is one of those that matter; -inf in groups without a correct completion.

    Args:
        values: THR, or for NTHR the influence without lengths, `[N]`.
        beta: tau is beta times the smallest mean of `values` over a correct completion of the group.
        quantile: instead, tau is this quantile of |values| over the group's tokens.
    """
    anchored = _anchored(segments, group, correct)
    tau = values.new_full(anchored.shape, float("-inf"))
    if quantile is not None:
        token_group = group[segments.ids]
        for g in anchored.nonzero().flatten().tolist():
            tau[g] = torch.quantile(values[token_group == g].abs(), quantile)
        return tau
    anchor = correct.bool() & (segments.lengths > 0)
    means = torch.where(anchor, segments.mean(values), float("inf"))
    smallest = torch.full_like(tau, float("inf")).scatter_reduce(0, group, means, "amin")
    return torch.where(anchored, beta * smallest, tau)


def thr_weights(
    values: Tensor, segments: Segments, group: Tensor, correct: Tensor, tau: Tensor | None = None, *, p: float = 0.0
) -> Tensor:
    """Token weights `[N]` that multiply the advantages: 1[|THR| > tau] (1 + p sign(THR)).

    Args:
        values: THR `[N]`.
        tau: `[G]` from `influence_threshold`; None: every token passes.
        p: above 0 favours what raises the likelihood of correct completions (exploitation), below 0 the opposite
            (exploration); 0 keeps the tokens that matter at weight 1.

    Returns:
        1 in groups that are not mixed. Masked tokens still count in the normaliser of the loss.

    Raises:
        ValueError: p outside [-1, 1], where weights would be negative.
    """
    if not -1 <= p <= 1:
        raise ValueError(f"p must lie in [-1, 1], got {p}")
    token_group = group[segments.ids]
    weights = 1 + p * torch.sign(values)
    if tau is not None:
        weights = weights * (values.abs() > tau[token_group]).to(weights.dtype)
    return torch.where(mixed_groups(segments, group, correct)[token_group], weights, 1.0)


def nthr_eta(group: Tensor, correct: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """eta = 2 |0.5 - success rate| of every group, `[G]`."""
    size = torch.bincount(group)
    right = torch.bincount(group, weights=correct.to(torch.float64), minlength=size.numel())
    return (2 * (0.5 - right / size.clamp(min=1)).abs()).to(dtype)


def nthr_weights(values: Tensor, segments: Segments, group: Tensor, correct: Tensor, tau: Tensor) -> Tensor:
    """NTHR's token weights `[N]`: eta for tokens of incorrect completions with influence above tau, else 1.

    Args:
        values: the influence `[N]`, with length_normalize=False.
        tau: `[G]` from `influence_threshold` of the same values.
    """
    token_group = group[segments.ids]
    penalised = ~correct.bool()[segments.ids] & (values > tau[token_group])
    return torch.where(penalised, nthr_eta(group, correct, values.dtype)[token_group], 1.0)


@dataclass
class _Group:
    """The n tokens of one group, the m of its correct completions (anchors) first.

    Attributes:
        hidden: `[n, H]`.
        labels: `[n]`.
        weights, completion: of the anchors `[m]`.
    """

    hidden: Tensor
    head: Head
    labels: Tensor
    weights: Tensor
    completion: Tensor
    exclude_self: bool

    def influence(self, restricted: bool, logps: Tensor | None) -> tuple[Tensor, Tensor]:
        """(influence, logps), `[n]` each."""
        width = max(CHUNK_BYTES // (len(self.labels) * self.weights.element_size()), 1)
        vocab = self.head.vocab_size
        present = torch.unique(self.labels)
        parts = [present] if restricted else [slice(i, min(i + width, vocab)) for i in range(0, vocab, width)]
        if logps is None and (restricted or len(parts) > 1):
            logps = head_quantities(self.hidden, self.head, self.labels, ("logps",))["logps"]
        if logps is None:
            logp = torch.log_softmax(self.logits(parts[0]), dim=-1)
            logps = logp.gather(1, self.labels[:, None]).squeeze(1)
            return self.contracted(self.errors(logp, parts[0])), logps
        place = torch.searchsorted(present, self.labels)
        log_z = self.logits(present).gather(1, place[:, None]).squeeze(1) - logps
        values = torch.zeros_like(logps)
        for part in parts:
            values += self.contracted(self.errors(self.logits(part).sub_(log_z[:, None]), part))
        return values, logps

    def logits(self, columns: Tensor | slice) -> Tensor:
        """Logits of some columns of the vocabulary `[n, k]`."""
        bias = None if self.head.bias is None else self.head.bias[columns]
        return replace(self.head, weight=self.head.weight[columns], bias=bias).logits(self.hidden)

    def errors(self, logp: Tensor, columns: Tensor | slice) -> Tensor:
        """softmax - onehot, -e, in these columns `[n, k]`, written over the log-probabilities; e stands twice."""
        errors = logp.exp_()
        if isinstance(columns, slice):
            inside = ((self.labels >= columns.start) & (self.labels < columns.stop)).nonzero().flatten()
            place = self.labels[inside] - columns.start
        else:
            inside, place = torch.arange(len(logp), device=logp.device), torch.searchsorted(columns, self.labels)
        errors[inside, place] -= 1
        return errors

    def contracted(self, errors: Tensor) -> Tensor:
        """Influence through these columns of the errors, `[n]`."""
        hidden = self.hidden.to(errors.dtype)
        values = _contract(errors, hidden, self.weights)
        for c in torch.unique(self.completion).tolist() if self.exclude_self else ():
            own = (self.completion == c).nonzero().flatten()
            values[own] -= _contract(errors[own], hidden[own], self.weights[own])
        return values


def _contract(errors: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
    """sum over the first m tokens a of w_a <e_a, e_t> <h_a, h_t> for every token t, `[n]`; exact either way."""
    (n, k), m, width = errors.shape, len(weights), hidden.shape[1]
    e, h = errors[:m], hidden[:m]
    pairs = n * m
    if pairs * (k + width) <= (n + m) * k * width and pairs * errors.element_size() <= CHUNK_BYTES:
        return (errors @ e.t()).mul_(hidden @ h.t()) @ weights
    return ((errors @ (e.t() @ (h * weights[:, None]))) * hidden).sum(-1)


# ----------------------------------------------------------------------------------------------------
# Credit steps of THR (arXiv 2510.03669) and NTHR (arXiv 2505.18830): advantages weighed by hidden influence.

Steering = Annotated[float, Bounds(ge=-1, le=1)]


class _Influence(Stateless):
    """What both have in common: the influence of every token on its group's correct completions."""

    name: str
    phase: Phase = "after"
    needs = frozenset({"hidden"})
    needs_group = True
    length_normalize: bool
    exclude_self: bool
    restricted: bool

    def influence(self, step: RolloutStep) -> tuple[Tensor, Tensor]:
        """(influence `[N]`, correct `[C]`)."""
        if step.correct is None or step.advantages is None:
            missing = "rewards that say what is correct" if step.correct is None else "advantages"
            raise RunError(f"credit {self.name!r} needs {missing}; this rollout has none")
        found = correct_influence(
            step.quantity("hidden"),
            step.head(),
            step.batch.labels,
            step.segments,
            step.group,
            step.correct,
            length_normalize=self.length_normalize,
            exclude_self=self.exclude_self,
            restricted=self.restricted,
            logps=step.quantity("old_logps"),
        )
        return found.values, step.correct

    def weigh(self, step: RolloutStep, weights: Tensor) -> None:
        """Multiply the advantages."""
        assert step.advantages is not None  # refused in `influence`
        step.advantages = step.advantages * weights.to(step.advantages)


@rollout_credit("thr", phase="after", needs={"hidden"}, group=True)
class THR(_Influence):
    """Keeps the tokens that matter to the correct completions of their group, and steers by the sign of how.

    A group without both a correct and an incorrect completion is left as it is. What counts as correct is
    `correct_from`'s reward above one half, whatever the rewards that advantages are made of.

    Args:
        p: weight 1 + p for tokens whose update raises the likelihood of correct completions, 1 - p for the
            others: above 0 for greedy accuracy, below 0 for pass@k; the paper has 0.1, 0 and -0.1.
        mask: leave out tokens of little influence. On models trained from scratch it slows learning a lot.
        beta: the mask's threshold, in smallest means of a correct completion.
        quantile: instead the threshold is this quantile of the group's absolute values.
        exclude_self: leave a token's own completion out.
        restricted: only vocabulary items that occur in the group; False: all, two more products with the head.
    """

    name = "thr"
    length_normalize = True

    def __init__(
        self,
        *,
        p: Steering = 0.1,
        mask: bool = True,
        beta: Number = 1.0,
        quantile: Share | None = None,
        exclude_self: bool = False,
        restricted: bool = True,
    ) -> None:
        self.p, self.mask, self.beta, self.quantile = p, mask, beta, quantile
        self.exclude_self, self.restricted = exclude_self, restricted

    def __call__(self, step: RolloutStep) -> None:
        influence, correct = self.influence(step)
        values = token_hidden_rewards(influence, step.segments, correct)
        tau = None
        if self.mask:
            tau = influence_threshold(
                values, step.segments, step.group, correct, beta=self.beta, quantile=self.quantile
            )
        weights = thr_weights(values, step.segments, step.group, correct, tau, p=self.p)
        self.weigh(step, weights)
        step.quantities["thr"] = values
        self._measure(step, values, weights, correct, tau)

    def _measure(self, step: RolloutStep, values: Tensor, weights: Tensor, correct: Tensor, tau: Tensor | None) -> None:
        mixed = mixed_groups(step.segments, step.group, correct)
        inside, right = mixed[step.group][step.segments.ids], correct.bool()[step.segments.ids]
        chosen = (weights != 0) & inside
        step.metrics |= {
            "thr/mixed": mean(mixed.float()),
            "thr/selected": mean(chosen[inside].float()),
            "thr/positive_correct": mean((values[inside & right] > 0).float()),
            "thr/positive_incorrect": mean((values[inside & ~right] > 0).float()),
        }
        if tau is not None:
            step.metrics["thr/tau"] = mean(tau[mixed])
        if "entropy" in step.quantities:
            step.metrics["thr/entropy_overlap"] = overlap(values[inside].abs(), step.quantities["entropy"][inside])


@rollout_credit("nthr", phase="after", needs={"hidden"}, group=True)
class NTHR(_Influence):
    """Takes penalties off tokens of incorrect completions that the correct ones share: eta times the advantage.

    Args:
        beta: threshold, in smallest means of a correct completion; 0 in one of the paper's runs.
        exclude_self, restricted: as for `THR`.
    """

    name = "nthr"
    length_normalize = False

    def __init__(self, *, beta: Number = 1.0, exclude_self: bool = False, restricted: bool = True) -> None:
        self.beta, self.exclude_self, self.restricted = beta, exclude_self, restricted

    def __call__(self, step: RolloutStep) -> None:
        influence, correct = self.influence(step)
        tau = influence_threshold(influence, step.segments, step.group, correct, beta=self.beta)
        weights = nthr_weights(influence, step.segments, step.group, correct, tau)
        self.weigh(step, weights)
        step.quantities["thr"] = influence
        mixed = mixed_groups(step.segments, step.group, correct)[step.group]
        wrong = (mixed & ~correct.bool())[step.segments.ids]
        step.metrics |= {
            "nthr/penalties_eased": mean((weights[wrong] != 1).float()),
            "nthr/weight": mean(weights[wrong]),
        }


def overlap(values: Tensor, entropy: Tensor, share: float = 0.2) -> float:
    """Of the tokens with the largest values, the share that is among those of the largest entropy."""
    count = int(share * len(values))
    if not count:
        return 0.0
    top = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    top[values.topk(count).indices] = True
    return float(top[entropy.topk(count).indices].double().mean())
