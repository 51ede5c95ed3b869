"""THR, Token Hidden Reward (arXiv 2510.03669), and its predecessor NTHR (arXiv 2505.18830).

A token's influence is what training on it does, to first order, to the correct completions of its group: the inner
product, over the weights W of the language-model head, of the gradient of its log-probability with the gradient of
their log-likelihood. With h the head's input and e = onehot(y) - softmax(W h),

    M       = Σ_{a in correct} w_a e_a h_aᵀ     [V, H], w_a = 1 / (tokens of a's completion) for THR, 1 for NTHR
    THR_t   = ± e_tᵀ M h_t                      + in a correct completion, - in an incorrect one
    THR     A'_t = 1[|THR_t| > τ] (1 + p sign THR_t) A_t        τ = β · the smallest mean THR of a correct completion
    NTHR    A'_t = 2 |1/2 - success rate| A_t    for tokens of incorrect completions with influence above τ

p > 0 exploits (greedy accuracy), p < 0 explores (pass@k). Groups without both a correct and an incorrect completion
stay as they are. What counts as correct is the reward `correct_from` above one half, whatever the advantages are made
of. Nothing here carries gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RunError
from tokengrain.method import Card, Rollout, rollout_credit
from tokengrain.methods._shaping import mean, reduce_groups
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

# Bytes alive at once of prediction errors [tokens of a group, columns], and of inner products of tokens.
CHUNK_BYTES = 256 << 20


@rollout_credit("thr", phase="after", needs={"hidden"}, group=True)
def thr(
    rollout: Rollout,
    *,
    p: Annotated[float, Bounds(ge=-1, le=1)] = 0.1,
    mask: bool = True,
    beta: Number = 1.0,
    quantile: Share | None = None,
    exclude_self: bool = False,
    restricted: bool = True,
) -> None:
    """Keeps the tokens that matter to the correct completions of their group, and steers by the sign of how.

    Args:
        p: weight 1 + p for tokens whose update raises the likelihood of correct completions, 1 - p for the others.
        mask: leave out tokens of little influence. It slows models trained from scratch down a lot.
        beta: the mask's threshold, in smallest means of a correct completion.
        quantile: the threshold is this quantile of the group's absolute values instead.
        exclude_self: leave a token's own completion out of M.
        restricted: of the vocabulary, M has only the items that occur in the group, hundreds instead of all, with the
            probabilities of the whole softmax.
    """
    correct, advantages, influence = _influence(rollout, "thr", exclude_self=exclude_self, restricted=restricted)
    where = rollout.segments, rollout.group, correct
    values = token_hidden_rewards(influence, rollout.segments, correct)
    tau = influence_threshold(values, *where, beta=beta, quantile=quantile) if mask else None
    weights = thr_weights(values, *where, tau, p=p)
    rollout.advantages = advantages * weights.to(advantages)
    rollout.quantities["thr"] = values

    mixed, right = mixed_groups(*where), rollout.broadcast(correct == 1)
    inside = rollout.broadcast(mixed[rollout.group] & ~correct.isnan())
    rollout.metrics |= {
        "thr/mixed": mean(mixed.float()),
        "thr/selected": mean((weights != 0)[inside].float()),
        "thr/positive_correct": mean((values[inside & right] > 0).float()),
        "thr/positive_incorrect": mean((values[inside & ~right] > 0).float()),
    }
    if tau is not None:
        rollout.metrics["thr/tau"] = mean(tau[mixed])
    if "entropy" in rollout.quantities:
        rollout.metrics["thr/entropy_overlap"] = overlap(values[inside].abs(), rollout.quantities["entropy"][inside])


@rollout_credit("nthr", phase="after", needs={"hidden"}, group=True)
def nthr(rollout: Rollout, *, beta: Number = 1.0, exclude_self: bool = False, restricted: bool = True) -> None:
    """Eases penalties of tokens of incorrect completions that the correct ones share.

    Args:
        beta: threshold, in smallest means of a correct completion; 0 in one of the paper's runs.
        exclude_self, restricted: as for `thr`.
    """
    settings = {"length_normalize": False, "exclude_self": exclude_self, "restricted": restricted}
    correct, advantages, influence = _influence(rollout, "nthr", **settings)
    where = rollout.segments, rollout.group, correct
    weights = nthr_weights(influence, *where, influence_threshold(influence, *where, beta=beta))
    rollout.advantages = advantages * weights.to(advantages)
    rollout.quantities["thr"] = influence
    wrong = rollout.broadcast(mixed_groups(*where)[rollout.group] & (correct == 0))
    rollout.metrics |= {
        "nthr/penalties_eased": mean((weights[wrong] != 1).float()),
        "nthr/weight": mean(weights[wrong]),
    }


def _influence(rollout: Rollout, name: str, **settings: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(correct `[C]`, advantages `[N]`, influence `[N]`)."""
    if rollout.correct is None or rollout.advantages is None:
        missing = "rewards that say what is correct" if rollout.correct is None else "advantages"
        raise RunError(f"credit {name!r} needs {missing}; this rollout has none")
    hidden, logps, labels = rollout.quantity("hidden"), rollout.quantity("old_logps"), rollout.batch.labels
    segments, group, correct = rollout.segments, rollout.group, rollout.correct
    values = correct_influence(hidden, rollout.head(), labels, segments, group, correct, logps=logps, **settings)
    return correct, rollout.advantages, values


@torch.no_grad()
def correct_influence(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    segments: Segments,
    group: Tensor,
    correct: Tensor,
    *,
    logps: Tensor | None = None,
    length_normalize: bool = True,
    exclude_self: bool = False,
    restricted: bool = False,
) -> Tensor:
    """Influence `[N]` of every token on the correct completions of its group; 0 in groups that are not mixed.

    `hidden` `[N, H]` is the old policy's head's input at the positions that predict the labels; without their `logps`
    a product with the whole head is needed. The head's scale, and the slope of its soft cap, are left out of the
    gradients. `length_normalize`: w_a is 1 / (tokens of a's completion), else 1; the others: see `thr`.
    """
    head = head.detach()
    if logps is None:
        logps = head_quantities(hidden, head, labels, ("logps",))["logps"]
    dtype = accumulation_dtype(hidden.dtype)
    lengths = segments.lengths.clamp(min=1).to(dtype)
    weights = segments.broadcast(1 / lengths if length_normalize else torch.ones_like(lengths))
    values, logps = torch.zeros_like(weights), logps.to(dtype)
    token_group, right = group[segments.ids], (correct == 1)[segments.ids]
    for g in mixed_groups(segments, group, correct).nonzero().flatten().tolist():
        own = token_group == g
        anchors = (own & right).nonzero().flatten()  # the tokens a
        rows = torch.cat([anchors, (own & ~right).nonzero().flatten()])
        h, w, completion = hidden[rows].to(dtype), weights[anchors], segments.ids[anchors]
        for e in _errors(hidden[rows], head, labels[rows], logps[rows], restricted):
            part = _contract(e, h, w)
            for c in torch.unique(completion).tolist() if exclude_self else ():
                same = (completion == c).nonzero().flatten()
                part[same] -= _contract(e[same], h[same], w[same])
            values[rows] += part
    return values


def _errors(hidden: Tensor, head: Head, labels: Tensor, logps: Tensor, restricted: bool) -> Iterator[Tensor]:
    """-e of the n tokens of a group `[n, columns]`, for one part of the vocabulary after the other; e stands twice."""

    def logits(columns: Tensor | slice) -> Tensor:
        bias = None if head.bias is None else head.bias[columns]
        return replace(head, weight=head.weight[columns], bias=bias).logits(hidden)

    def errors(columns: Tensor | slice, inside: Tensor, place: Tensor) -> Tensor:
        found = logits(columns).sub_(log_z[:, None]).exp_()
        found[inside, place] -= 1
        return found

    present = torch.unique(labels)
    place = torch.searchsorted(present, labels)
    log_z = logits(present).gather(1, place[:, None]).squeeze(1) - logps
    if restricted:
        yield errors(present, torch.arange(len(labels), device=labels.device), place)
        return
    width = max(CHUNK_BYTES // (len(labels) * logps.element_size()), 1)
    for start in range(0, head.vocab_size, width):
        inside = ((labels >= start) & (labels < start + width)).nonzero().flatten()
        yield errors(slice(start, start + width), inside, labels[inside] - start)


def _contract(errors: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
    """Σ over the first m tokens a of w_a <e_a, e_t> <h_a, h_t> for every token t `[n]`, with the fewer products."""
    (n, k), m, width = errors.shape, len(weights), hidden.shape[1]
    e, h = errors[:m], hidden[:m]
    pairs = n * m
    if pairs * (k + width) <= (n + m) * k * width and pairs * errors.element_size() <= CHUNK_BYTES:
        return (errors @ e.t()).mul_(hidden @ h.t()) @ weights  # pair by pair
    return ((errors @ (e.t() @ (h * weights[:, None]))) * hidden).sum(-1)  # by M: linear in the tokens


def mixed_groups(segments: Segments, group: Tensor, correct: Tensor) -> Tensor:
    """Groups with a correct completion that has tokens, and with an incorrect one, bool `[G]`.

    A completion of which that is not known (NaN) is neither, and its tokens have weight 1.
    """
    right = torch.bincount(group, weights=((correct == 1) & (segments.lengths > 0)).double()) > 0
    return right & (torch.bincount(group, weights=(correct == 0).double()) > 0)


def token_hidden_rewards(influence: Tensor, segments: Segments, correct: Tensor) -> Tensor:
    """THR `[N]`: the influence with its sign turned for tokens of incorrect completions, which are pushed down."""
    return influence * segments.broadcast(torch.where(correct == 0, -1.0, 1.0).to(influence.dtype))


def influence_threshold(
    values: Tensor, segments: Segments, group: Tensor, correct: Tensor, *, beta: float, quantile: float | None = None
) -> Tensor:
    """τ `[G]` of THR, or for NTHR of the influence without lengths; -inf in groups without a correct completion."""
    means = torch.where((correct == 1) & (segments.lengths > 0), segments.mean(values), torch.inf)
    smallest = reduce_groups(means, group, torch.inf, "amin")
    anchored = smallest < torch.inf
    tau = torch.where(anchored, beta * smallest, -torch.inf)
    if quantile is not None:
        for g in anchored.nonzero().flatten().tolist():
            tau[g] = torch.quantile(values[group[segments.ids] == g].abs(), quantile)
    return tau


def thr_weights(
    values: Tensor, segments: Segments, group: Tensor, correct: Tensor, tau: Tensor | None = None, *, p: float = 0.0
) -> Tensor:
    """1[|THR| > τ] (1 + p sign THR) of every token `[N]`; 1 in groups that are not mixed; τ None: no mask."""
    token_group = group[segments.ids]
    weights = 1 + p * torch.sign(values)
    if tau is not None:
        weights = weights * (values.abs() > tau[token_group]).to(weights.dtype)
    inside = mixed_groups(segments, group, correct)[group] & ~correct.isnan()
    return torch.where(inside[segments.ids], weights, 1.0)


def nthr_weights(values: Tensor, segments: Segments, group: Tensor, correct: Tensor, tau: Tensor) -> Tensor:
    """eta for tokens of incorrect completions whose influence `values` (not by lengths) exceeds τ, else 1: `[N]`."""
    token_group = group[segments.ids]
    eased = (correct == 0)[segments.ids] & (values > tau[token_group])
    return torch.where(eased, nthr_eta(group, correct, values.dtype)[token_group], 1.0)


def nthr_eta(group: Tensor, correct: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """eta = 2 |1/2 - success rate| of every group, `[G]`."""
    size = torch.bincount(group, weights=(~correct.isnan()).double())
    right = torch.bincount(group, weights=(correct == 1).double(), minlength=size.numel())
    return (2 * (0.5 - right / size.clamp(min=1)).abs()).to(dtype)


def overlap(values: Tensor, entropy: Tensor) -> float:
    """Of the fifth of tokens with the largest values, the share that is among the fifth of the largest entropy."""
    count = int(0.2 * len(values))
    return mean(torch.isin(values.topk(count).indices, entropy.topk(count).indices).double())
