"""The corruption test: a few tokens of good answers are spoilt; does credit fall there, and only there?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.bench.measure import credit_and_cost
from tokengrain.errors import DataError, RecipeError
from tokengrain.evaluation import auc, bootstrap, lowest_hits

How = Literal["random", "unlikely", "swap"]
NEIGHBOURS = 3
"""Tokens after a corrupted one that are its neighbours: the model is still startled there."""
PART = 16
MEASURES = (
    "auc", "auc_neighbours", "auc_elsewhere", "drop", "drop_neighbours", "drop_elsewhere", "top1", "topk",
)  # fmt: skip


@dataclass(frozen=True)
class Corrupted:
    """Answers before and after.

    Attributes:
        clean: the answers, one completion per prompt.
        spoilt: the same with other tokens in some places; lengths are the same.
        marked: bool `[N]`, the places.
        left_out: answers that were too short to spoil.
    """

    clean: TokenBatch
    spoilt: TokenBatch
    marked: Tensor
    left_out: int


def corrupt(
    batch: TokenBatch, tokenizer: Any, *, how: How = "random", tokens: int = 2, seed: int = 0, model: Any = None
) -> Corrupted:
    """Spoil good answers.

    Args:
        batch: good answers, one completion per prompt.
        tokenizer: tells special tokens, which are never touched or put in, and where words begin.
        how: "random" puts in another token, drawn from the answers of all rows; "unlikely" one of the half of
            these that `model` finds least likely there; "swap" exchanges neighbouring words.
        tokens: how many places per answer, never next to each other (fewer where there is no room).
        seed: of the choices; where an answer is spoilt does not depend on the other rows.
        model: for "unlikely": a causal language model.

    Raises:
        RecipeError: an unknown way, or "unlikely" without a model.
        DataError: no answer is long enough, or the prompts do not have one answer each.
    """
    if how not in get_args(How) or tokens < 1:
        raise RecipeError(f"how is {how!r}, tokens is {tokens}; expected one of {get_args(How)} and at least 1")
    if batch.n_completions != batch.n_prompts:
        raise DataError("the corruption test takes one answer per prompt", value=batch.n_completions)
    special = set(tokenizer.all_special_ids)
    pool = [t for t in batch.labels.tolist() if t not in special]
    pick = _Substitutes(batch, pool, model) if how == "unlikely" else None
    clean: list[Sample] = []
    spoilt: list[Sample] = []
    marked: list[bool] = []
    for i in range(batch.n_prompts):
        ids = batch.completion(i).tolist()
        start, end = batch.completion_offsets[i : i + 2].tolist()
        counted = batch.counted[start:end].tolist()
        row = batch.rows[i] if batch.rows else i
        generator = torch.Generator().manual_seed(_seed(seed, ids))
        usable = [k and t not in special for t, k in zip(ids, counted, strict=True)]
        if how == "swap":
            changed, places = _swapped(ids, usable, tokenizer, tokens, generator)
        else:
            places = _places(usable, tokens, generator)
            changed = list(ids)
            for place in places:
                flat = sum(counted[:place])
                candidates = pool if pick is None else pick(i, flat)
                changed[place] = _other(candidates, ids[place], generator)
        if not places or not any(k and p not in places for p, k in enumerate(counted)):
            continue
        prompt, raw = batch.prompt(i).tolist(), dict(batch.raw[i]) if batch.raw else {}
        # A source that reads the answer's text would see the clean one.
        raw = {k: v for k, v in raw.items() if k == "prompt"}
        for samples, answer in ((clean, ids), (spoilt, changed)):
            samples.append(Sample(prompt, [Completion(answer, counted)], row=row, raw=raw))
        marked += [p in places for p, k in enumerate(counted) if k]
    if not clean:
        raise DataError("no answer is long enough to be spoilt", expected="answers of at least two words")
    both = [TokenBatch.from_samples(samples) for samples in (clean, spoilt)]
    return Corrupted(both[0], both[1], torch.tensor(marked), batch.n_prompts - len(clean))


class _Substitutes:
    """Per place, the half of the data's tokens that a model finds least likely."""

    def __init__(self, batch: TokenBatch, pool: Sequence[int], model: Any) -> None:
        from tokengrain.scoring import distribution_of
        from tokengrain.scoring.forward import evaluating

        if model is None:
            raise RecipeError("corruption 'unlikely' needs a model")
        self.ids = torch.tensor(sorted(set(pool)))
        self.offsets = batch.segments.offsets.tolist()
        with evaluating(model):
            parts = [distribution_of(model, batch.select([i])) for i in range(batch.n_prompts)]
        self.hidden, self.head = torch.cat([p.hidden for p in parts]), parts[0].head

    def __call__(self, row: int, place: int) -> list[int]:
        at = self.offsets[row] + place
        logits = self.head.logits(self.hidden[at : at + 1])[0].cpu()
        return self.ids[logits[self.ids].argsort()[: max(2, len(self.ids) // 2)]].tolist()


def _seed(seed: int, ids: Sequence[int]) -> int:
    from tokengrain.files import fingerprint

    return int(fingerprint([seed, list(ids)]), 16) >> 1


def _places(usable: Sequence[bool], count: int, generator: torch.Generator) -> list[int]:
    """At most `count` usable places, no two next to each other."""
    chosen: list[int] = []
    for place in torch.randperm(len(usable), generator=generator).tolist():
        if usable[place] and all(abs(place - other) > 1 for other in chosen):
            chosen.append(place)
        if len(chosen) == count:
            break
    return chosen


def _other(candidates: Sequence[int], token: int, generator: torch.Generator) -> int:
    """A candidate that is not `token`."""
    start = int(torch.randint(len(candidates), (1,), generator=generator))
    for step in range(len(candidates)):
        if (found := candidates[(start + step) % len(candidates)]) != token:
            return found
    raise DataError("the answers consist of one token only", value=token)


def _swapped(
    ids: Sequence[int], usable: Sequence[bool], tokenizer: Any, count: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """The ids with `count` pairs of neighbouring words exchanged, and all places of these words."""
    from tokengrain.report.samples import token_texts

    texts = token_texts(tokenizer, ids)
    begins = [i for i, text in enumerate(texts) if i and text[:1].isspace()]
    words = [range(a, b) for a, b in zip(begins, [*begins[1:], len(ids)], strict=True)]
    pairs = [
        (first, second)
        for first, second in pairwise(words)
        if all(usable[p] for p in (*first, *second)) and [ids[p] for p in first] != [ids[p] for p in second]
    ]
    changed, places = list(ids), set[int]()
    for i in torch.randperm(len(pairs), generator=generator).tolist():
        first, second = pairs[i]
        around = range(first.start - 1, second.stop + 1)
        if len(places) and any(p in places for p in around):
            continue
        changed[first.start : second.stop] = [*(ids[p] for p in second), *(ids[p] for p in first)]
        places |= {*first, *second}
        count -= 1
        if not count:
            break
    return changed, sorted(places)


# --------------------------------------------------------------------------------------------------------- the test


def corruption_test(
    sources: Mapping[str, Callable[[TokenBatch], Tensor]],
    data: Corrupted,
    *,
    neighbours: int = NEIGHBOURS,
    seed: int = 0,
    after: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], dict[str, tuple[Tensor, Tensor]]]:
    """How each source's credit reacts to the corruption.

    Per answer, then averaged over answers with a bootstrap interval over them:
    `auc`: chance that a corrupted token has lower credit than an untouched one of the same answer;
    `auc_neighbours`, `auc_elsewhere`: the same against the next `neighbours` tokens after a corrupted one
    only, and against all other untouched tokens only;
    `drop`: credit at the place in the clean answer minus credit there now, in standard deviations of the
    source's credit over the clean answers; `drop_neighbours` and `drop_elsewhere` at the untouched tokens
    after the first corrupted one;
    `top1`, `topk`: share of the lowest token, and of the k lowest, that are corrupted, k being how many are.

    Args:
        sources: by name: called with a batch, give `[N]`.
        data: as `corrupt` makes it.
        neighbours: how many tokens after a corrupted one count as its neighbours.
        seed: of the bootstrap.
        after: called after every source.

    Returns:
        One entry per source: `source`, `measures`, `deviation` (the standard deviation that `drop` is in),
        `seconds` per 1,000 tokens, `passes`, `reads`; and the credit of every source: (clean, corrupted).
    """
    entries, credit = [], {}
    near, later = surroundings(data, neighbours)
    for name, source in sources.items():
        before, _ = credit_and_cost(source, data.clean, PART)
        now, cost = credit_and_cost(source, data.spoilt, PART)
        deviation = float(before.std())
        columns = _per_answer(data, before, now, near, later, deviation)
        measures = {name: _interval(values, seed) for name, values in columns.items()}
        entries.append({"source": name, "measures": measures, "deviation": deviation, **cost})
        credit[name] = (before, now)
        after()
    return entries, credit


def chance_top1(data: Corrupted) -> float:
    """`top1` and `topk` of credit that knows nothing: the mean share of corrupted tokens."""
    return float(data.spoilt.segments.mean(data.marked.double()).mean())


def surroundings(data: Corrupted, neighbours: int) -> tuple[Tensor, Tensor]:
    """Bool `[N]`: untouched tokens within `neighbours` after a corrupted one; other untouched ones after the first."""
    near, later = [], []
    for marked in data.spoilt.segments.split(data.marked):
        number = torch.arange(len(marked))
        last = torch.where(marked, number, -len(marked) - neighbours).cummax(0).values
        distance = number - last
        near.append(~marked & (distance <= neighbours))
        later.append(~marked & (distance > neighbours) & (last >= 0))
    return torch.cat(near), torch.cat(later)


def _per_answer(
    data: Corrupted, before: Tensor, now: Tensor, near: Tensor, later: Tensor, deviation: float
) -> dict[str, Tensor]:
    """Each measure of every answer `[C]`; NaN where it is not defined."""
    segments, marked = data.spoilt.segments, data.marked
    out = {name: torch.full((len(segments),), float("nan"), dtype=torch.float64) for name in MEASURES}
    fall = (before - now).double() / (deviation or float("nan"))
    parts = [segments.split(x) for x in (now, marked, near, later, fall)]
    for i, (credit, hit, beside, after, drop) in enumerate(zip(*parts, strict=True)):
        for name, others in (("auc", ~hit), ("auc_neighbours", beside), ("auc_elsewhere", ~hit & ~beside)):
            kept = hit | others
            out[name][i] = auc(-credit[kept], hit[kept])
        for name, those in (("drop", hit), ("drop_neighbours", beside), ("drop_elsewhere", after)):
            if those.any():
                out[name][i] = drop[those].mean()
    out["top1"] = lowest_hits(now, marked, segments)
    out["topk"] = lowest_hits(now, marked, segments, segments.sum(marked.long()))
    return out


def _interval(values: Tensor, seed: int) -> dict[str, Any]:
    """Mean over the answers where it is defined, with a 95 % bootstrap interval over them."""
    known = values[~values.isnan()]
    if not len(known):
        return {"mean": None, "low": None, "high": None, "answers": 0}
    found = bootstrap(lambda means: means[..., 0], known[:, None], resamples=1000, seed=seed)
    return {"mean": found.value, "low": found.low, "high": found.high, "answers": len(known)}
