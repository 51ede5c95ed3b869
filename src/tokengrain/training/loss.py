"""From a batch to losses: ask credit, reference and teacher, score the policy, apply the objective."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokengrain.batch import Pairs, Segments, TokenBatch
from tokengrain.errors import DataError, RecipeError, require
from tokengrain.loss import LossOutput, Role, resolve_role
from tokengrain.method import FROZEN, TAUGHT, BoundObjective, as_credit, check_source_for_role, make_objective
from tokengrain.methods._pairs import weight_metrics
from tokengrain.scoring.model import balancing
from tokengrain.scoring.prepare import coarse, scored_model
from tokengrain.scoring.reference import ColumnReference, Reference, ReferenceScores
from tokengrain.scoring.score import score


@dataclass(frozen=True)
class CreditUse:
    """Credit `[N]` of a batch from its source, in the role that the objective takes it in."""

    source: Any
    role: Role

    def __call__(self, batch: TokenBatch, pairs: Pairs | None = None) -> Tensor:
        values = self.source(batch).detach().to(batch.device)
        return self.role(values, batch.segments) if pairs is None else self.role(values[pairs.tokens], pairs.segments)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must agree on."""
        return {"source": self.source.name, "as": self.role.describe()}


def resolve_credit(
    credit: Any, credit_as: Any, objective: BoundObjective, columns: tuple[str, ...]
) -> CreditUse | None:
    """How credit enters an objective; None if it takes none, or takes the data's own column as it is.

    `credit`, `credit_as`: as for `PreferenceTrainer`; `columns`: per-token columns of the data that are known.
    """
    if credit is None and credit_as is None:
        needed = {"selected", "spans"} & set(objective.needs) - set(columns)
        # Scores in the data and a loss that wants a selection of them.
        if not needed or (needed == {"spans"} and "token_rewards" not in columns):
            return None
    role = resolve_role(credit_as, objective.roles, objective.name, objective.no_credit)
    source = as_credit("column" if credit is None else credit)
    check_source_for_role(source, role)
    return CreditUse(source, role)


def resolve_objective(objective: Any) -> BoundObjective:
    """A bound objective as it is; a name or a user's loss function bound with its default settings."""
    if isinstance(objective, BoundObjective):
        return objective
    what = f"objective must be a name, a bound objective or a function, got {type(objective).__name__}"
    require(isinstance(objective, str) or callable(objective), RecipeError, what)
    return make_objective(objective)


@dataclass
class Judged:
    """One micro-batch judged by the objective; measures are per counted token `[N]`, nats, detached."""

    output: LossOutput  # with gradient in training
    segments: Segments  # of what the objective read: perhaps only some tokens, or a chosen one's for every pair
    entropy: Tensor | None = None
    kl: Tensor | None = None
    log_ratio: Tensor | None = None
    balance: Tensor | None = None  # a mixture of experts' load-balancing loss times its coefficient, with gradient


@dataclass
class PreferenceLoss:
    """Objective, reference, credit (None: the data's own columns) and teacher bound together."""

    objective: BoundObjective
    reference: Reference | None
    credit: CreditUse | None
    _: KW_ONLY
    teacher: Callable[[TokenBatch], Any] | None = None
    layout: Any = None
    chunk_tokens: int | None = None
    temperature: float = 1.0  # of log-probabilities and entropy
    stored: bool = False  # log-probabilities are compared with those that were stored: see `coarse`

    @property
    def score_options(self) -> dict[str, Any]:
        return {"layout": self.layout, "chunk_tokens": self.chunk_tokens, "temperature": self.temperature}

    def __call__(
        self,
        model: nn.Module,
        batch: TokenBatch,
        *,
        measure: Collection[str] = (),
        frozen_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Judged:
        """Score `batch` with the policy's outermost module and apply the objective.

        A completion that stands in several pairs is scored once; the objective sees it once per pair.

        Args:
            measure: also measure any of "entropy", "kl", "log_ratio" (detached), and "whole": score all counted
                tokens, also those that the objective does not read, and add the metrics of whole completions.
            frozen_context: entered around reference, credit and teacher (mixed precision).
        """
        needs, main = set(self.objective.needs), self.objective.main
        pairs = batch.pairs if self.objective.unit == "pairs" and batch.is_pairs else None
        segments = batch.segments if pairs is None else pairs.segments
        with torch.no_grad(), frozen_context():
            given = self._given(batch, pairs)
            keep, alone = self._reads(segments, given), self.stored and coarse(model)
            whole = keep is None or "whole" in measure or alone  # what comes behind a token takes part in its rounding
            read = keep if keep is None or pairs is None else _in_batch(keep, pairs, batch.segments.total)
            part = batch if read is None or whole else batch.narrow(read)
            # A column of log-probabilities gives no KL over the whole vocabulary.
            wants_kl = "kl" in needs or ("kl" in measure and not isinstance(self.reference, ColumnReference))
            asked = {"logps", "distribution"} if wants_kl else {"logps"}
            frozen = ReferenceScores() if self.reference is None else self.reference(part, asked)
            teacher = self.teacher(part) if needs & TAUGHT and self.teacher is not None else None
        want = [main, *(["kl"] if frozen.distribution is not None else []), *(["teacher_kl"] if teacher else [])]
        want += ["entropy"] if "entropy" in measure and main == "logps" else []
        balanced = balancing(scored_model(model))
        want += ["aux_loss"] if balanced is not None else []
        taught: dict[str, Any] = {"teacher": teacher} if teacher is not None else {}
        options = {**taught, **self.score_options, "max_row_tokens": 1 if alone else None}
        scores = score(model, part, tuple(want), reference=frozen.distribution, **options)
        found = {name: getattr(scores, name) for name in (main, "kl", *TAUGHT)} | {"ref_logps": frozen.logps}
        scored: dict[str, Tensor] = {name: value for name, value in found.items() if value is not None}
        judged_tokens, all_segments = scored, segments
        if pairs is not None:
            places = pairs.tokens if read is None or whole else (read.cumsum(0) - 1)[pairs.tokens]
            judged_tokens = {name: value[places] for name, value in scored.items()}
        if keep is not None:
            given = {name: value[keep] for name, value in given.items()}
            if whole or pairs is not None:
                judged_tokens = {name: value[keep] for name, value in judged_tokens.items()}
            segments = segments.narrow(keep)
        entropy, kl = (None if values is None else values.detach() for values in (scores.entropy, scored.get("kl")))
        judged = Judged(self._apply(segments, judged_tokens | given), segments, entropy, kl)
        if "log_ratio" in measure and {"logps", "ref_logps"} <= scored.keys():
            judged.log_ratio = (scored["logps"] - scored["ref_logps"]).detach()
        if keep is not None and "whole" in measure and main == "logps" and batch.is_pairs:
            tokens = {name: value if pairs is None else value[pairs.tokens] for name, value in scored.items()}
            judged.output.metrics |= _whole_metrics(tokens, all_segments)
        if balanced is not None and scores.aux_loss is not None:
            judged.balance = balanced[1] * scores.aux_loss
            judged.output.metrics |= {"aux_loss": scores.aux_loss.detach()}
        return judged

    def _given(self, batch: TokenBatch, pairs: Pairs | None) -> dict[str, Tensor]:
        """Quantities per judged token that need no policy: credit in its role, and columns of the data."""
        given = {}
        if self.credit is not None:
            given[self.credit.role.provides] = self.credit(batch, pairs)
        needed = set(self.objective.needs) - FROZEN - TAUGHT - given.keys()
        for name in needed - batch.columns.keys():
            what = f"objective {self.objective.name} needs per-token {name}"
            raise DataError(what, field=name, row=batch.rows[0] if batch.rows else None)
        needed |= self.objective.optional & batch.columns.keys() - FROZEN
        columns = {name: batch.columns[name] for name in needed}
        return given | {n: values if pairs is None else values[pairs.tokens] for n, values in columns.items()}

    def _reads(self, segments: Segments, given: Mapping[str, Tensor]) -> Tensor | None:
        """The judged tokens that the loss looks at, bool; None: all."""
        own = self.objective.reads(segments, given)
        if own is None and "selected" in given and "selected" not in self.objective.needs:
            own = given["selected"] > 0
        return own

    def _apply(self, segments: Segments, quantities: Mapping[str, Tensor]) -> LossOutput:
        """The objective on these quantities; token weights that it does not take itself are multiplied in."""
        wanted = {self.objective.main, *self.objective.needs, *self.objective.optional}
        args = {name: value for name, value in quantities.items() if name in wanted}
        weights = quantities.get("token_weights")
        if weights is None or "token_weights" in wanted:
            return self.objective(segments=segments, **args)
        weighted = {name: value * weights if name in ("logps", "ref_logps") else value for name, value in args.items()}
        output = self.objective(segments=segments, **weighted)
        with torch.no_grad():  # rewards and accuracies are those of whole, unweighted completions: comparable
            plain = self.objective(segments=segments, **{n: v.detach() for n, v in args.items()})
        output.metrics = plain.metrics | weight_metrics(weights, segments)
        return output


def _in_batch(keep: Tensor, pairs: Pairs, total: int) -> Tensor:
    """Which of a batch's tokens any pair keeps, bool `[N]`."""
    found = torch.zeros(total, dtype=torch.bool, device=keep.device)
    found[pairs.tokens[keep]] = True
    return found


def _whole_metrics(scored: Mapping[str, Tensor], segments: Segments) -> dict[str, Tensor]:
    """Which completion the policy prefers when all tokens count: by log-ratio, or by mean log-probability."""
    logps = scored["logps"].detach()
    has_reference = "ref_logps" in scored
    values = segments.sum(logps - scored["ref_logps"]) if has_reference else segments.mean(logps)
    chosen, rejected = segments.pairs(values)
    return {"whole/accuracies": (chosen > rejected).to(values.dtype), "whole/margins": chosen - rejected}
