"""Evaluation from several samples per prompt: pass@k, avg@k, maj@k, by group, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from tokengrain.evaluation.intervals import CONFIDENCE, Estimate, bootstrap, wilson

Ties = Literal["share", "first", "wrong"]


def pass_at_k(n: int | Tensor, c: int | Tensor, k: int) -> Tensor:
    """Chance that at least one of k samples is right, estimated without bias from n samples with c right ones.

    1 − C(n − c, k) / C(n, k): of all ways to take k of the n samples, those without a right one (arXiv 2107.03374,
    equation 1). Plugging the share of right samples into 1 − (1 − p)^k instead would be too low.

    Args:
        n, c: numbers, or long tensors that broadcast.
        k: at least 1 and at most n.

    Returns:
        float64 in [0, 1], of the shape of `n` and `c`.

    Raises:
        ValueError: k or c out of range.
    """
    total, right = torch.broadcast_tensors(torch.as_tensor(n), torch.as_tensor(c))
    if k < 1 or bool((total < k).any()):
        raise ValueError(
            f"k is {k}; expected at least 1 and at most the samples, of which there are {int(total.min())}"
        )
    if bool(((right < 0) | (right > total)).any()):
        raise ValueError(f"expected 0 <= c <= n, got c from {int(right.min())} to {int(right.max())}")
    # C(n − c, k) / C(n, k) as a product of k factors, each in [0, 1]: no factorials that overflow.
    i = torch.arange(k, dtype=torch.float64, device=total.device)
    wrong = (total - right).double()[..., None]
    none = ((wrong - i) / (total.double()[..., None] - i)).clamp(min=0.0).prod(-1)
    return 1.0 - none


def avg_at_k(correct: Tensor, k: int | None = None) -> Tensor:
    """Mean of the first k of each prompt's samples: `[P, n] -> [P]` (None: all n)."""
    return _first(correct, k).double().mean(1)


def maj_at_k(
    answers: Sequence[Sequence[Hashable]], correct: Tensor, k: int | None = None, *, ties: Ties = "share"
) -> Tensor:
    """Whether the most frequent answer among the first k samples of each prompt is right.

    Args:
        answers: `[P][n]`; None for a sample without an answer, which has no vote.
        correct: bool `[P, n]`; an answer counts as right if the first sample that gives it is.
        k: how many samples vote (None: all n).
        ties: of several answers with the most votes, "share" counts the share of them that is right, which is
            what a fair draw among them would reach on average; "first" takes the one that came first; "wrong" counts 0.

    Returns:
        float64 `[P]` in [0, 1]; 0 where no sample has an answer.

    Raises:
        ValueError: shapes that do not fit; another word for ties.
    """
    if ties not in get_args(Ties):
        raise ValueError(f"ties is {ties!r}; expected one of {', '.join(get_args(Ties))}")
    right = _first(correct, k)
    if len(answers) != len(correct) or any(len(a) != correct.shape[1] for a in answers):
        raise ValueError(f"expected an answer for each of {tuple(correct.shape)} samples")
    out = []
    for given, good in zip(answers, right.tolist(), strict=True):
        verdicts: dict[Hashable, bool] = {}
        for answer, verdict in zip(given, good):
            if answer is not None:
                verdicts.setdefault(answer, bool(verdict))
        votes = Counter(a for a in given[: len(good)] if a is not None)
        most = max(votes.values(), default=0)
        top = [verdicts[a] for a, count in votes.items() if count == most]  # in the order they came
        if not top:
            out.append(0.0)
        elif len(top) == 1 or ties == "first":
            out.append(float(top[0]))
        else:
            out.append(sum(top) / len(top) if ties == "share" else 0.0)
    return torch.tensor(out, dtype=torch.float64)


def utilised(correct: Tensor) -> Tensor:
    """Prompts with right and wrong samples, from which group advantages learn something: `[P, n] -> bool [P]`."""
    right = correct.bool()
    return right.any(1) & ~right.all(1)


def mean_over_prompts(values: Tensor, *, confidence: float = CONFIDENCE, seed: int = 0) -> Estimate:
    """Mean of one number per prompt `[P]`, with an interval over prompts.

    Samples of one prompt are not independent, prompts are: the interval is Wilson's where every prompt has 0 or 1, and
    a percentile bootstrap over prompts otherwise. Prompts that all have the same number (a single one, say) give the
    bootstrap nothing to vary: of a number in [0, 1] Wilson's interval is taken, which is too wide rather than empty.
    """
    x = values.double()
    if not len(x):
        raise ValueError("there are no prompts")
    if bool(((x == 0) | (x == 1)).all()) or (bool((x == x[0]).all()) and 0 <= x[0] <= 1):
        return wilson(float(x.sum()), len(x), confidence)
    return bootstrap(lambda means: means[..., 0], x[:, None], confidence=confidence, seed=seed)


def by_group(
    values: Tensor, keys: Sequence[Hashable], *, confidence: float = CONFIDENCE, seed: int = 0
) -> dict[Hashable, Estimate]:
    """`mean_over_prompts` of the prompts of each key, in order of first appearance.

    Args:
        values: `[P]`; keys: one per prompt, such as its level.
    """
    if len(keys) != len(values):
        raise ValueError(f"{len(keys)} keys for {len(values)} prompts")
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return {key: mean_over_prompts(values[at], confidence=confidence, seed=seed) for key, at in groups.items()}


def sample_metrics(
    correct: Tensor, answers: Sequence[Sequence[Hashable]] | None = None, k: int | None = None
) -> dict[str, Tensor]:
    """The measures of this module per prompt, each `[P]`.

    Args:
        correct: bool `[P, n]`.
        answers: for maj@k.
        k: the largest k (None: n).

    Returns:
        `accuracy` (the share of all n samples), `pass@j` for j = 1, 2, 4, ... and k, `avg@k`, `maj@k`, `utilisation`.
    """
    n = correct.shape[1]
    k = n if k is None else k
    right = correct.long().sum(1)
    found = {"accuracy": avg_at_k(correct)}
    powers = [2**i for i in range(k.bit_length()) if 2**i < k]
    found |= {f"pass@{j}": pass_at_k(n, right, j) for j in (*powers, k)}
    found[f"avg@{k}"] = avg_at_k(correct, k)
    if answers is not None:
        found[f"maj@{k}"] = maj_at_k(answers, correct, k)
    found["utilisation"] = utilised(correct).double()
    return found


def _first(correct: Tensor, k: int | None) -> Tensor:
    if correct.dim() != 2 or not correct.shape[1]:
        raise ValueError(f"expected samples [P, n] with n > 0, got shape {tuple(correct.shape)}")
    if k is not None and not 1 <= k <= correct.shape[1]:
        raise ValueError(f"k is {k}; expected at least 1 and at most {correct.shape[1]} samples")
    return correct[:, :k]
