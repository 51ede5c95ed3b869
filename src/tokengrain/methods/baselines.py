"""Baselines and controls: credit that comes with the data, from a function, from chance, or from a model's uncertainty.

None has seen a preference, so a credit source must beat them: `random` knows nothing and must change nothing, and a
source that finds a corrupted token no better than `surprise` has found what is unusual, not what is wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokengrain.batch import TokenBatch, row_of
from tokengrain.errors import DataError, RecipeError, require
from tokengrain.method import as_credit, checked_credit, credit
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.reference import scorer_distribution, scorer_logps
from tokengrain.scoring.score import score
from tokengrain.settings import NonNegative, Number
from tokengrain.vision import unseen


@credit("column", column=lambda settings: settings["column"])
def column(batch: TokenBatch, *, column: str = "token_rewards") -> Tensor:
    """Per-token rewards that came with the data, `chosen_token_rewards` and `rejected_token_rewards`.

    Args:
        column: its name in `batch.columns`.
    """
    expected = f"chosen_{column} and rejected_{column} in every row, or another source"
    given = {"row": batch.rows[0] if batch.rows else None, "value": sorted(batch.columns), "expected": expected}
    require(column in batch.columns, DataError, f"the data have no per-token column {column!r}", **given)
    return checked_credit(batch.columns[column], batch, f"column {column}")


@credit("function", code=("function",))
class FunctionCredit:
    """A Python function of yours.

    Args:
        function: `(batch) -> Tensor [N]`, or a list with one sequence of numbers per completion, over the
            tokens that count; or an import string of it, "module:function" or "path.py:function".
    """

    def __init__(self, *, function: str | Callable[[TokenBatch], Any]) -> None:
        self.source = as_credit(function)
        self.name, self.fingerprint = self.source.name, self.source.fingerprint

    def __call__(self, batch: TokenBatch) -> Tensor:
        return self.source(batch)


RANDOM_BOUNDS = "credit 'random' needs low < high, got low={low} and high={high}"


@credit(
    "random",
    values=lambda settings: "signed" if settings["low"] < 0 else "any",
    check=lambda given: require(given["low"] < given["high"], RecipeError, RANDOM_BOUNDS.format(**given)),
)
def random(batch: TokenBatch, *, low: Number = -0.5, high: Number = 0.5, seed: int = 0) -> Tensor:
    """Uniform random numbers, as a control.

    A token's number, between low and high, depends on the seed, its row, its completion and its place in it, not on
    the batch, so it is the same in every epoch and micro-batch.
    """
    parts, seen = [], dict.fromkeys(range(batch.n_prompts), 0)
    lengths = batch.segments.lengths.tolist()
    for completion, (group, length) in enumerate(zip(batch.group.tolist(), lengths, strict=True)):
        key = f"{seed}/{row_of(batch, completion)}/{seen[group]}".encode()
        seen[group] += 1
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
        parts.append(torch.rand(length, generator=generator))
    return low + (high - low) * torch.cat(parts)


@credit("surprise", values="order", judges_itself=True)
def surprise(batch: TokenBatch, *, model: Any) -> Tensor:
    """Log-probability of the token: what the model finds improbable counts as bad, as a baseline.

    `model` is normally the starting model: a model, or anything called like a `Reference`.
    """
    return scorer_logps(model, batch)


@credit("lookahead", values="order", judges_itself=True)
def lookahead(batch: TokenBatch, *, model: Any, omitted: NonNegative = 0.5) -> Tensor:
    """Surprise, one token ahead: log p(token) + log p(next) - `omitted` * log p(next, if the token were left out).

    A wrong token makes the next one improbable, and the text is likelier without it: both count against the token. One
    forward pass gives all three. Where nothing counted follows at once, as at the end, it is the log-probability.

    Args:
        model: as for `surprise`.
        omitted: 0 is the log-probability of both tokens, 1 the log-odds of the token against its being left out.
    """
    own = scorer_distribution(model, batch)
    labels = batch.labels.to(own.hidden.device)
    (here,) = batch.counted.nonzero(as_tuple=True)
    followed = (here.diff() == 1) & ~batch.segments.is_last[:-1]
    now = followed.nonzero().squeeze(1).to(labels.device)
    logps = head_quantities(own.hidden, own.head, labels, ("logps",))["logps"]
    without = head_quantities(own.hidden[now], own.head, labels[now + 1], ("logps",))["logps"]
    return logps.index_add(0, now, logps[now + 1] - omitted * without).detach()


@credit("entropy", values="order", judges_itself=True)
def entropy(batch: TokenBatch, *, model: Any) -> Tensor:
    """Entropy (nats) of the distribution the token was drawn from, as a baseline.

    It says where something was decided, not whether the decision was good. `model` is as for `surprise`.
    """
    if isinstance(model, nn.Module):
        with evaluating(model):
            found = score(model, batch, ("entropy",)).entropy
        assert found is not None  # it was asked for
        return found
    own = scorer_distribution(model, batch)
    return head_quantities(own.hidden, own.head, batch.labels.to(own.hidden.device), ("entropy",))["entropy"]


@credit("sight", values="signed", judges_itself=True, patches="without")
def sight(batch: TokenBatch, *, model: Any) -> Tensor:
    """log p with the prompt's pictures - log p with grey ones: how much of a token the model sees.

    Below 0 the pictures speak against the token; behind a prompt without pictures all is 0. `model` is as for
    `surprise`.
    """
    if not batch.sees:
        return torch.zeros(batch.segments.total, device=batch.device)
    blind = replace(batch, vision=tuple(unseen(vision) for vision in batch.vision))
    return scorer_logps(model, batch) - scorer_logps(model, blind)
