"""From a batch to losses: score the policy, ask the reference and the credit source, apply the objective."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.errors import DataError, RecipeError
from tokengrain.objectives import BoundObjective, make_objective
from tokengrain.objectives.output import LossOutput
from tokengrain.scoring import score
from tokengrain.scoring.reference import ColumnReference, Reference


def resolve_objective(objective: Any) -> BoundObjective:
    """A bound objective as it is; a name or a user's loss function bound with its default settings."""
    if isinstance(objective, str) or (callable(objective) and not hasattr(objective, "needs")):
        return make_objective(objective)
    if hasattr(objective, "needs"):
        return objective
    raise RecipeError(f"objective must be a name, a bound objective or a function, got {type(objective).__name__}")


def resolve_credit(credit: Any, objective: Any) -> Any:
    """A credit source, a user's function wrapped as one, or None; refused where the objective ignores it."""
    if credit is None:
        return None
    if "token_rewards" not in objective.needs:
        raise RecipeError(f"objective {objective.name} does not use token rewards; credit must be None")
    if hasattr(credit, "fingerprint"):
        return credit
    if callable(credit):
        from tokengrain.credit import FunctionCredit

        return FunctionCredit(function=credit)
    raise RecipeError(f"credit must be a CreditSource or a function of a TokenBatch, got {type(credit).__name__}")


@dataclass
class Judged:
    """One micro-batch judged by the objective.

    Attributes:
        output: what the objective returned, with gradient in training.
        entropy, kl, log_ratio: per counted token `[N]`, nats, detached; None if not asked for or not known.
    """

    output: LossOutput
    entropy: Tensor | None = None
    kl: Tensor | None = None
    log_ratio: Tensor | None = None


class PreferenceLoss:
    """Objective, reference and credit source bound together.

    Args:
        objective: with `needs` and `__call__(logps=, segments=, **quantities)`.
        reference: None if the objective needs none.
        credit: None: the column `token_rewards`.
        layout, chunk_tokens: passed to `score`.
    """

    def __init__(
        self,
        objective: BoundObjective,
        reference: Reference | None,
        credit: Callable[[TokenBatch], Tensor] | None,
        *,
        layout: Any = None,
        chunk_tokens: int | None = None,
    ) -> None:
        self.objective, self.reference, self.credit = objective, reference, credit
        self.score_options = {"layout": layout, "chunk_tokens": chunk_tokens}

    @property
    def has_distribution(self) -> bool:
        """Whether a full-vocabulary KL to the reference can be had."""
        return self.reference is not None and not isinstance(self.reference, ColumnReference)

    def __call__(
        self,
        model: nn.Module,
        batch: TokenBatch,
        *,
        measure: Collection[str] = (),
        frozen_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Judged:
        """Score `batch` and apply the objective.

        Args:
            model: the outermost module of the policy.
            measure: also measure any of "entropy", "kl", "log_ratio" (detached).
            frozen_context: entered around reference and credit (mixed precision).
        """
        needs = set(self.objective.needs)
        want_kl = "kl" in needs or ("kl" in measure and self.has_distribution)
        quantities: dict[str, Tensor] = {}
        distribution = None
        with torch.no_grad(), frozen_context():
            if self.reference is not None:
                wanted = {"logps", "distribution"} if want_kl else {"logps"}
                frozen = self.reference(batch, wanted)
                distribution = frozen.distribution
                if frozen.logps is not None:
                    quantities["ref_logps"] = frozen.logps
            for name in needs - {"ref_logps", "kl"}:
                quantities[name] = self._column(name, batch)
        want = ["logps", *(["kl"] if distribution is not None else [])]
        want += ["entropy"] if "entropy" in measure else []
        scores = score(model, batch, tuple(want), reference=distribution, **self.score_options)
        assert scores.logps is not None  # it was wanted
        if scores.kl is not None:
            quantities["kl"] = scores.kl
        given = {name: value for name, value in quantities.items() if name in needs}
        output = self.objective(logps=scores.logps, segments=batch.segments, **given)
        judged = Judged(output, _detached(scores.entropy), _detached(scores.kl))
        if "log_ratio" in measure and "ref_logps" in quantities:
            judged.log_ratio = (scores.logps - quantities["ref_logps"]).detach()
        return judged

    def _column(self, name: str, batch: TokenBatch) -> Tensor:
        """A quantity `[N]` from the credit source (token rewards) or from the data's column of that name."""
        if name == "token_rewards" and self.credit is not None:
            return self.credit(batch).detach().to(batch.device)
        if name not in batch.columns:
            raise DataError(f"objective {self.objective.name} needs per-token {name}", field=name, row=batch.rows[0])
        return batch.columns[name]


def _detached(values: Tensor | None) -> Tensor | None:
    return values.detach() if values is not None else None
