"""Credit recovery: how well per-token credit agrees with the true advantage of every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from tokengrain.batch import Segments, TokenBatch
from tokengrain.errors import require

AUC_MARGIN = 0.3  # AUC leaves out tokens whose true advantage is smaller than this: their sign matters to nobody
BINS, TOP = 10, 3


class CreditTruth(NamedTuple):
    """Completions of a base model, the true advantage `[N]` of every token, and whether it decided something."""

    batch: TokenBatch
    advantages: Tensor
    decisions: Tensor


def parts_of(batch: TokenBatch, size: int = 64) -> list[TokenBatch]:
    """The batch cut into parts of so many prompts, as credit sources are asked."""
    return [batch.select(range(i, min(i + size, batch.n_prompts))) for i in range(0, batch.n_prompts, size)]


def spearman(credit: Tensor, truth: Tensor) -> float:
    """Rank correlation of two vectors `[n]`, in [−1, 1]; NaN when one of them is constant."""
    credit, truth = _checked(credit, truth)
    if len(credit) < 2 or credit.min() == credit.max() or truth.min() == truth.max():
        return float("nan")
    return float(stats.spearmanr(credit.numpy(), truth.numpy()).statistic)


def auc(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive has a higher score than a negative, a tie counting half, `[n]`; NaN without both."""
    scores, positive = _checked(scores, positive)
    positive = positive.bool()
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return float("nan")
    ranks = torch.from_numpy(stats.rankdata(scores.numpy()))
    above = float(ranks[positive].sum()) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * n_negative)


def recovery(credit: Tensor, truth: Tensor, decisions: Tensor | None = None) -> dict[str, float]:
    """Agreement of credit `[N]` with the truth: `spearman`, and `auc` for truth > 0 where |truth| > `AUC_MARGIN`."""
    credit, truth = _checked(credit, truth)
    if decisions is not None:
        credit, truth = credit[decisions], truth[decisions]
    large = truth.abs() > AUC_MARGIN
    return {"spearman": spearman(credit, truth), "auc": auc(credit[large], truth[large] > 0), "tokens": len(credit)}


def recovered(
    source: Callable[[TokenBatch], Tensor], known: CreditTruth, *, culprits: bool = False
) -> dict[str, float]:
    """`recovery` of a source on completions whose truth is known.

    `culprits`: `auc` is the chance that a token with truth below 0 has less credit than another decision.
    """
    credit = torch.cat([source(part).detach().cpu() for part in parts_of(known.batch)])
    found = recovery(credit, known.advantages, known.decisions)
    if culprits:
        decided = known.decisions
        found["auc"] = auc(-credit[decided], known.advantages[decided] < 0)
    return found


def credit_scores(credit: Tensor, truth: Tensor, decisions: Tensor, segments: Segments) -> dict[str, float]:
    """Everything that `tokengrain bench credit` says about the agreement of a source with the truth, each `[N]`.

    Those of `recovery` and `calibration`, and, NaN where not defined: `auc_harm`, the chance that a harmful token
    (truth < −`AUC_MARGIN`) has lower credit than another decision token; `top1`, `lowest_hits` of the tokens of lowest
    truth, over completions with a harmful token; `top1_chance`, what random credit would reach; `alarm`, the chance
    that the lowest credit of a completion with a harmful token is below that of a completion without one;
    `completions` and `harmed`, how many there are.
    """
    credit, truth = _checked(credit, truth)
    harmful = truth < -AUC_MARGIN
    harmed = segments.sum(harmful.long()) > 0
    lowest = -segments.max(-truth)
    marked = (truth <= segments.broadcast(lowest) + 1e-9) & segments.broadcast(harmed)
    found = calibration(credit[decisions], truth[decisions], segments.ids[decisions])
    return {
        **recovery(credit, truth, decisions),
        "auc_harm": auc(-credit[decisions], harmful[decisions]),
        "top1": float(lowest_hits(credit, marked, segments)[harmed].mean()),
        "top1_chance": float(segments.mean(marked.double())[harmed].mean()),
        "alarm": auc(segments.max(-credit), harmed),
        "completions": len(segments),
        "harmed": int(harmed.sum()),
        **{name: getattr(found, name) for name in ("scale", "r2", "ece", "skill")},
    }


def lowest_hits(credit: Tensor, marked: Tensor, segments: Segments, k: Tensor | None = None) -> Tensor:
    """Share of each completion's `k` tokens of lowest credit (`[C]`; None: 1) that are marked, `[C]`; NaN without any.

    Ties are counted by expectation: of m tokens tied for the last r places, each has a chance of r/m.
    """
    out = torch.full((len(segments),), float("nan"), dtype=torch.float64)
    parts = zip(segments.split(credit.double()), segments.split(marked.bool()), strict=True)
    for i, (values, wanted) in enumerate(parts):
        if not wanted.any():
            continue
        places = 1 if k is None else int(k[i])
        last = values.kthvalue(places).values
        below, tied = values < last, values == last
        left = places - int(below.sum())
        out[i] = (float(wanted[below].sum()) + left * float(wanted[tied].double().mean())) / places
    return out


class Calibration(NamedTuple):
    """Whether the size of credit means something.

    `scale`: the factor that brings it nearest to the truth; `r2`: what it then explains; `ece`: expected calibration
    error of the chance that truth < 0; `skill`: its Brier skill over the base rate; `bins`: by quantile of credit, the
    mean `credit`, `predicted` and `observed` share of truth < 0, and `tokens`.
    """

    scale: float
    r2: float
    ece: float
    skill: float
    bins: list[dict[str, float]]


def calibration(credit: Tensor, truth: Tensor, completions: Tensor) -> Calibration:
    """Calibration of credit against the truth, `[n]`; `completions` is the completion of every token.

    P(truth < 0 | credit) = σ(a − b·credit) is fitted on every other completion (on every other pair, where right and
    wrong ones take turns) and judged on the others, and the other way round; `ece` is the mean over tokens of
    |observed − predicted| of their bin. Credit that says nothing predicts the base rate, with an `ece` near 0: read it
    together with `skill`.
    """
    credit, truth = _checked(credit, truth)
    negative, fold = (truth < 0).double(), completions.cpu() % 2
    if any(len(negative[fold == part].unique()) < 2 for part in (0, 1)):
        fold = completions.cpu() // 2 % 2
    squares, spread = float(credit.square().sum()), float((truth - truth.mean()).square().sum())
    scale = float((credit * truth).sum()) / squares if squares else float("nan")
    r2 = 1 - float((truth - scale * credit).square().sum()) / spread if squares and spread else float("nan")
    predicted = torch.empty_like(credit)
    for part in (0, 1):
        if not (fold == part).any() or not (fold != part).any():
            return Calibration(scale, r2, float("nan"), float("nan"), [])
        a, b = _logistic(credit[fold != part, None], negative[fold != part])
        predicted[fold == part] = torch.sigmoid(a + b * credit[fold == part])
    rate = float(negative.mean())
    brier = float((predicted - negative).square().mean())
    skill = 1 - brier / (rate * (1 - rate)) if 0 < rate < 1 else float("nan")
    edges = torch.quantile(credit, torch.linspace(0, 1, BINS + 1, dtype=credit.dtype)[1:-1]).unique()
    place = torch.bucketize(credit, edges, right=True)
    columns = {"credit": credit, "predicted": predicted, "observed": negative}
    bins = [
        {name: float(values[inside].mean()) for name, values in columns.items()} | {"tokens": float(inside.sum())}
        for inside in (place == b for b in place.unique())
    ]
    ece = sum(b["tokens"] * abs(b["observed"] - b["predicted"]) for b in bins) / len(credit)
    return Calibration(scale, r2, ece, skill, bins)


def _logistic(features: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """`(a, b)` of P(y = 1) = σ(a + features · b), `[n, k]`, by damped Newton.

    A faint pull towards 0 keeps both finite.
    """
    centre, spread = features.mean(0), features.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    design = torch.cat([torch.ones_like(features[:, :1]), (features - centre) / spread], 1)
    pull = 1e-4 * torch.eye(design.shape[1], dtype=design.dtype)

    def loss(w: Tensor) -> float:
        fit = torch.nn.functional.binary_cross_entropy_with_logits(design @ w, y)
        return float(fit + 0.5 * w @ pull @ w)

    w = design.new_zeros(design.shape[1])
    for _ in range(100):
        p = torch.sigmoid(design @ w)
        gradient = design.T @ (p - y) / len(y) + pull @ w
        curvature = (design.T * (p * (1 - p))) @ design / len(y) + pull
        step, now = torch.linalg.solve(curvature, gradient), loss(w)
        while loss(w - step) > now and float(step.abs().max()) > 1e-12:
            step = step / 2
        w = w - step
        if float(step.abs().max()) < 1e-9:
            break
    slopes = w[1:] / spread
    return float(w[0] - slopes @ centre), slopes


def added_auc(credit: Tensor, known: Tensor, marked: Tensor, segments: Segments) -> Tensor:
    """What credit knows beyond another source `known`, per completion `[C]`; all others flat `[N]`.

    The AUC of finding the marked tokens by a logistic function of both, fitted on every other completion and judged on
    the others, minus the AUC of low `known` alone. About 0 for credit that says nothing new; NaN where none is marked.
    """
    features = torch.stack([known, credit], 1).double().cpu()
    marked, fold = marked.cpu().bool(), segments.ids.cpu() % 2
    score = torch.full((len(marked),), float("nan"), dtype=torch.float64)
    for part in (0, 1):
        if marked[fold != part].any():
            a, b = _logistic(features[fold != part], marked[fold != part].double())
            score[fold == part] = a + features[fold == part] @ b
    parts = zip(segments.split(score), segments.split(known), segments.split(marked), strict=True)
    gains = [auc(s, m) - auc(-k, m) if not s.isnan().any() else float("nan") for s, k, m in parts]
    return torch.tensor(gains, dtype=torch.float64)


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    message = f"expected two vectors of one length, got shapes {tuple(a.shape)} and {tuple(b.shape)}"
    require(a.dim() == 1 and a.shape == b.shape, ValueError, message)
    finite = a.isfinite().all() and b.isfinite().all()
    require(finite, ValueError, "expected finite numbers, got NaN or infinite ones")
    return a.detach().cpu().double(), b.detach().cpu().double()


def pointing_scores(
    credit: Tensor, marked: Tensor, among: Tensor, segments: Segments, *, low: bool = True
) -> dict[str, float]:
    """How well credit points at the marked tokens of each completion, whatever it says about others.

    Only completions with a marked token count, each the same. Credit that is equal for all tokens of a completion, such
    as its outcome, is at chance in each of these. Low credit points at a token, or high credit if not `low`.

    `auc_inside`: chance that a marked token is pointed at more than another of `among` in the same completion, a tie
    counting half; `place1`: share of completions whose most pointed-at token is marked; `place3`: of the three most
    pointed-at tokens (or as many as are marked, if fewer), the share that is marked; `share`: of the sum of |credit|
    over the completion, the part at marked tokens; `place1_chance` and `place3_chance`: what credit without knowledge
    reaches (the first also for `share`). NaN without a marked token. Ties count by expectation, and so does a
    completion whose credit is all 0.
    """
    credit, marked = credit.detach().cpu().double(), marked.bool().cpu()
    among = among.bool().cpu() | marked
    pointed = credit if low else -credit
    numbers = segments.sum(marked.double())
    has = numbers > 0
    places = segments.lengths.clamp(max=TOP)
    reachable = torch.minimum(places.double(), numbers)
    hits = lowest_hits(pointed, marked, segments, places) * places / reachable
    sizes, chance = segments.sum(credit.abs()), segments.mean(marked.double())
    at_marked = segments.sum(credit.abs() * marked)
    share = torch.where(sizes > 0, at_marked / torch.where(sizes > 0, sizes, 1.0), chance)
    parts = zip(segments.split(pointed), segments.split(marked), segments.split(among), strict=True)
    inside = torch.tensor([auc(-p[a], m[a]) for p, m, a in parts if bool(m.any())], dtype=torch.float64)
    return {
        "auc_inside": float(inside.nanmean()),
        "place1": float(lowest_hits(pointed, marked, segments)[has].mean()),
        "place3": float(hits[has].mean()),
        "share": float(share[has].mean()),
        "place1_chance": float(chance[has].mean()),
        "place3_chance": float((places * chance / reachable)[has].mean()),
    }
