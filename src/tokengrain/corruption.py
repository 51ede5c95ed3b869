"""Good answers with a few tokens changed, where it is known that credit should fall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.data.tokens import token_texts
from tokengrain.errors import DataError, RecipeError, fingerprint, require
from tokengrain.evaluation.credit import auc
from tokengrain.evaluation.statistics import bootstrap
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.score import distribution_of

How = Literal["random", "unlikely", "swap"]


class Corrupted(NamedTuple):
    """Answers before and after the corruption: same lengths, one completion per prompt.

    `marked`: bool `[N]`, the corrupted places; `left_out`: answers that were too short to corrupt.
    """

    clean: TokenBatch
    corrupted: TokenBatch
    marked: Tensor
    left_out: int


def corrupt(
    batch: TokenBatch, tokenizer: Any, *, how: str = "random", tokens: int = 2, seed: int = 0, model: Any = None
) -> Corrupted:
    """Change up to `tokens` tokens of good answers, one completion per prompt, no two next to each other.

    "random" puts in another token, drawn from the answers of all rows; "unlikely" one of the half of these that `model`
    finds least likely there; "swap" exchanges neighbouring words. Special tokens are never touched or put in. Which
    places change does not depend on the other rows.
    """
    message = f"how is {how!r}, tokens is {tokens}; expected one of {get_args(How)} and at least 1"
    require(how in get_args(How) and tokens >= 1, RecipeError, message)
    one = batch.n_completions == batch.n_prompts
    require(one, DataError, "the corruption test takes one answer per prompt", value=batch.n_completions)
    require(how != "unlikely" or model is not None, RecipeError, "corruption 'unlikely' needs a model")
    special = set(tokenizer.all_special_ids)
    pool = [t for t in batch.labels.tolist() if t not in special]
    unlikely = _unlikely(batch, pool, model) if how == "unlikely" else None
    clean: list[Sample] = []
    corrupted: list[Sample] = []
    marked: list[bool] = []
    for i in range(batch.n_prompts):
        ids, counted = batch.completion(i).tolist(), counted_of(batch, i)
        generator = torch.Generator().manual_seed(int(fingerprint([seed, ids]), 16) >> 1)
        usable = [k and t not in special for t, k in zip(ids, counted, strict=True)]
        if how == "swap":
            changed, places = _swapped(ids, usable, tokenizer, tokens, generator)
        else:
            places = _places(usable, tokens, generator)
            changed = list(ids)
            for place in places:
                candidates = pool if unlikely is None else unlikely(i, sum(counted[:place]))
                changed[place] = _other(candidates, ids[place], generator)
        if not places or not any(k and p not in places for p, k in enumerate(counted)):
            continue
        # Only the prompt's text: a source that reads the answer's would see the clean one.
        raw = {k: v for k, v in batch.raw[i].items() if k == "prompt"} if batch.raw else {}
        for samples, answer in ((clean, ids), (corrupted, changed)):
            samples.append(batch.sample(i, [Completion(answer, counted)], raw=raw))
        marked += [p in places for p, k in enumerate(counted) if k]
    require(clean, DataError, "no answer is long enough to be corrupted", expected="answers of at least two words")
    both = [TokenBatch.from_samples(samples) for samples in (clean, corrupted)]
    return Corrupted(both[0], both[1], torch.tensor(marked), batch.n_prompts - len(clean))


def _unlikely(batch: TokenBatch, pool: Sequence[int], model: Any) -> Callable[[int, int], list[int]]:
    """Per row and counted place, the half of the data's tokens that a model finds least likely."""
    ids, offsets = torch.tensor(sorted(set(pool))), batch.segments.offsets.tolist()
    with evaluating(model):
        parts = [distribution_of(model, batch.select([i])) for i in range(batch.n_prompts)]
    hidden, head = torch.cat([p.hidden for p in parts]), parts[0].head

    def candidates(row: int, place: int) -> list[int]:
        at = offsets[row] + place
        logits = head.logits(hidden[at : at + 1])[0].cpu()
        return ids[logits[ids].argsort()[: max(2, len(ids) // 2)]].tolist()

    return candidates


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
    start = int(torch.randint(len(candidates), (1,), generator=generator))
    for step in range(len(candidates)):
        if (found := candidates[(start + step) % len(candidates)]) != token:
            return found
    raise DataError("the answers consist of one token only", value=token)


def _swapped(
    ids: Sequence[int], usable: Sequence[bool], tokenizer: Any, count: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """The ids with `count` pairs of neighbouring words exchanged, and all places of these words."""
    texts = token_texts(tokenizer, ids)
    begins = [i for i, text in enumerate(texts) if i and text[:1].isspace()]
    words = [range(a, b) for a, b in pairwise([*begins, len(ids)])]
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


def counted_of(batch: TokenBatch, index: int) -> list[bool]:
    """Which tokens of a completion count."""
    start, end = batch.completion_offsets[index : index + 2].tolist()
    return batch.counted[start:end].tolist()


class SelfCheck(NamedTuple):
    """Chance that credit is lower at a changed token than elsewhere in its answer: mean, 95 % bounds, answers."""

    auc: float
    low: float
    high: float
    answers: int

    def what(self) -> str:
        """The finding in words."""
        found = f"AUC {self.auc:.2f} ({self.low:.2f} to {self.high:.2f}) for corrupted tokens of {self.answers} answers"
        if self.low > 0.5:
            return f"credit is lower where an answer is corrupted: {found}"
        wrong = "it points the wrong way" if self.high < 0.5 else "this cannot be told from chance"
        return f"credit should be lower where an answer is corrupted, and {wrong}: {found}"


def self_check(
    source: Callable[[TokenBatch], Tensor], samples: Sequence[Sample], tokenizer: Any, *, seed: int = 0
) -> SelfCheck:
    """Ask credit for answers (first completions) in which two tokens were replaced. Raises as `corrupt`."""
    answers = [sample.again(completions=[sample.completions[0]]) for sample in samples]
    data = corrupt(TokenBatch.from_samples(answers), tokenizer, seed=seed)
    with torch.no_grad():
        credit = source(data.corrupted).detach().cpu()
    parts = zip(*map(data.corrupted.segments.split, (credit, data.marked)), strict=True)
    found = torch.tensor([auc(-values, hit) for values, hit in parts], dtype=torch.float64)
    found = found[~found.isnan()]
    mean, low, high = bootstrap(lambda means: means[..., 0], found[:, None], resamples=1000, seed=seed)
    return SelfCheck(mean, low, high, len(found))
