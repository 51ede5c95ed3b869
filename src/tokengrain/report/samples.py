"""Credit samples: a few pairs with the credit of each token, made for looking at.

`credit_samples.json` in a run folder is a list of

    {"prompt": str, "source": str, "row": int | str,
     "chosen":   {"tokens": [str], "credit": [float], "truth": [float]},
     "rejected": {"tokens": [str], "credit": [float], "truth": [float]}}

with one entry per pair and source. `tokens` are pieces of text that give the completion when joined; `credit`
has one number per token, or null for a token that does not count. `truth` (optional) is the exact advantage,
where the world knows it. Rows with one completion have only `chosen`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.errors import DataError
from tokengrain.files import read_json

FILE = "credit_samples.json"
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Side:
    """One completion: its tokens, their credit (None where a token does not count), the truth if known.

    `clipped`, of a rollout: -1, 0 or 1 per token, for a ratio that was clipped below, not clipped, clipped above.
    """

    tokens: Sequence[str]
    credit: Sequence[float | None]
    truth: Sequence[float | None] | None = None
    clipped: Sequence[int] | None = None


@dataclass(frozen=True)
class CreditSample:
    """One pair as seen by one credit source; `sides` is (chosen, rejected) or a single completion."""

    prompt: str
    source: str
    sides: tuple[Side, ...]
    row: int | str | None = None


_SIGNS = {
    **{i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\t\n"},
    **{i: f"\\x{i:x}" for i in range(0x7F, 0xA0)},
    **{i: f"\\u{i:x}" for i in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))},
}


def visible(text: str) -> str:
    """Text with signs for control characters, which a terminal would obey and a page would not show, and for those that
    turn the direction of what follows."""
    return text.translate(_SIGNS)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token such that joining them gives the decoded whole.

    A character that is spread over several tokens is given to the last of them; the others get "".
    """
    texts: list[str] = []
    start = read = 0  # decode only from `start`: the last token that was read whole gives the context for spaces
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[start:read])
        now = _decode(tokenizer, ids[start:end])
        if now.endswith("�") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = read, end
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    if not ids:
        return ""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def collect_credit_samples(
    batch: TokenBatch,
    tokenizer: Any,
    credit: Mapping[str, Tensor],
    *,
    truth: Tensor | None = None,
    count: int | None = None,
) -> list[dict[str, Any]]:
    """Make the entries of `credit_samples.json` for the first `count` prompts of a batch.

    Args:
        batch: pairs, or prompts with one completion.
        tokenizer: the tokenizer the ids belong to.
        credit: name of the source to its credit `[N]`.
        truth: exact advantage `[N]`, where it is known.
        count: prompts to take (None: all).
    """
    values = {name: _listed(batch, tensor) for name, tensor in credit.items()}
    exact = _listed(batch, truth) if truth is not None else None
    entries: list[dict[str, Any]] = []
    groups = batch.group.tolist()
    for g in range(min(batch.n_prompts, batch.n_prompts if count is None else count)):
        prompt = tokenizer.decode(batch.prompt(g).tolist(), skip_special_tokens=False)
        completions = [c for c, group in enumerate(groups) if group == g]
        texts = {c: token_texts(tokenizer, batch.completion(c).tolist()) for c in completions}
        for name, lists in values.items():
            entry: dict[str, Any] = {"prompt": prompt, "source": name}
            if batch.rows:
                entry["row"] = batch.rows[g]
            for side, c in zip(SIDES, completions, strict=False):
                entry[side] = {"tokens": texts[c], "credit": lists[c]}
                if exact is not None:
                    entry[side]["truth"] = exact[c]
            entries.append(entry)
    return entries


def _listed(batch: TokenBatch, values: Tensor) -> list[list[float | None]]:
    """Flat `[N]` to one list per completion, None where a token does not count."""
    if values.shape != (batch.segments.total,):
        raise ValueError(f"credit has shape {tuple(values.shape)}, expected ({batch.segments.total},)")
    numbers = iter(values.detach().float().cpu().tolist())
    bounds, counted = batch.completion_offsets.tolist(), batch.counted.tolist()
    return [
        [round(next(numbers), 6) if keep else None for keep in counted[start:end]] for start, end in pairwise(bounds)
    ]


def read_credit_samples(path: Path) -> list[CreditSample]:
    """Read and check `credit_samples.json`; an absent file is an empty list."""
    if not path.exists():
        return []
    try:
        entries = read_json(path)
    except ValueError as error:  # or not UTF-8
        raise DataError(f"not JSON: {error}", file=path) from error
    if not isinstance(entries, list):
        raise DataError("wrong content", file=path, value=type(entries).__name__, expected="a list of samples")
    return [_parse(path, row, entry) for row, entry in enumerate(entries)]


def _parse(path: Path, row: int, entry: Any) -> CreditSample:
    if not isinstance(entry, dict) or "chosen" not in entry:
        raise DataError("not a credit sample", file=path, row=row, expected="an object with a 'chosen' side")
    sides = []
    for name in SIDES:
        if name not in entry:
            continue
        side = entry[name]
        if not isinstance(side, dict):
            raise DataError("not a side of a pair", file=path, row=row, field=name, value=side, expected="an object")
        tokens, credit, truth = side.get("tokens", []), side.get("credit", []), side.get("truth")
        for key, values in (("credit", credit), ("truth", truth)):
            if values is None:
                continue
            if not isinstance(values, list) or not isinstance(tokens, list):
                raise DataError("not lists", file=path, row=row, field=f"{name}.{key}", value=values, expected="a list")
            if len(values) != len(tokens):
                raise DataError(
                    "the numbers do not fit the tokens",
                    file=path,
                    row=row,
                    field=f"{name}.{key}",
                    value=f"{len(values)} numbers",
                    expected=f"{len(tokens)}, one per token",
                )
            if not all(v is None or (isinstance(v, int | float) and math.isfinite(v)) for v in values):
                raise DataError("not finite numbers", file=path, row=row, field=f"{name}.{key}", value=values)
        sides.append(Side(tokens, credit, truth))
    return CreditSample(str(entry.get("prompt", "")), str(entry.get("source", "")), tuple(sides), entry.get("row"))


def by_pair(samples: Sequence[CreditSample]) -> list[list[CreditSample]]:
    """Samples of the same pair together, in order of first appearance; all get the first one's row.

    A pair is known by its text: an annotated file numbers its rows anew. Of one source, the same text again is another
    pair.
    """
    groups: dict[Any, list[CreditSample]] = {}
    seen: Counter[Any] = Counter()
    for s in samples:
        text = s.prompt, tuple(tuple(side.tokens) for side in s.sides)
        group = groups.setdefault((text, seen[text, s.source]), [])
        seen[text, s.source] += 1
        group.append(replace(s, row=group[0].row) if group else s)
    return list(groups.values())


def colour_scale(values: Sequence[float | None]) -> float:
    """The |credit| that gets full colour: the 98th percentile, so that one outlier does not pale the rest."""
    sizes = sorted(abs(v) for v in values if v is not None)
    if not sizes or sizes[-1] == 0:
        return 1.0
    at = sizes[min(len(sizes) - 1, math.ceil(0.98 * len(sizes)) - 1)]
    return at or sizes[-1]
