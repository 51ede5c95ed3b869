"""One optimiser step: its batches, what its loss is divided by, the loss of a micro-batch, and its record."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokengrain.batch import Pairs, Segments, TokenBatch, offsets_of
from tokengrain.errors import DataError, RecipeError, require
from tokengrain.loss import Counts, LossOutput, Role, resolve_role
from tokengrain.method import FROZEN, TAUGHT, BoundObjective, as_credit, check_source_for_role, make_objective
from tokengrain.methods._pairs import higher, weight_metrics
from tokengrain.scoring.model import balancing
from tokengrain.scoring.prepare import coarse, scored_model
from tokengrain.scoring.reference import ColumnReference, Reference, ReferenceScores
from tokengrain.scoring.score import score

OLD_LOGPS = "old_logps"  # the policy's when it sampled, nats per token

# ---- What ranks do together. Every rank must call these equally often; none of them changes its input. ----


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce(values: Tensor, device: torch.device, op: str = "sum") -> Tensor:
    """`values`, of equal shape on all ranks, summed ("sum") or maximised ("max") over them, on the host."""
    if not several_ranks():
        return values
    on_device = values.to(device, copy=True)
    dist.all_reduce(on_device, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return on_device.cpu()


def all_gather(value: Any) -> list[Any]:
    """The values of all ranks, in the order of ranks: anything that can be pickled."""
    if not several_ranks():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ---- What a step is made of: batches on the host, their counts on all ranks, their micro-batches. ----


@dataclass(frozen=True)
class HostBatch:
    """A `TokenBatch` that stays in host memory when the data loader moves batches to the device.

    Counting and cutting read lengths, which on an accelerator would make the host wait.
    """

    batch: TokenBatch
    real: bool = True  # else this rank has nothing to learn from in the step, and the batch stands in without weight

    def to(self, device: torch.device | str, non_blocking: bool = False) -> HostBatch:
        return self


@dataclass(frozen=True)
class StepPlan:
    """What all ranks know of one optimiser step."""

    counts: Counts  # over its batches on all ranks
    tokens: int  # of prompts and completions together
    passes: tuple[int, ...] | None = None  # of the model, for each of this rank's batches; None: as many as each needs


def counts_of(batch: TokenBatch) -> Counts:
    pairs = batch.pairs if batch.is_pairs else None
    counts = Counts.of(batch.segments, pairs=batch.is_pairs and pairs is None, prompts=batch.n_prompts)
    if pairs is None:
        return counts
    chosen, _ = pairs.segments.pairs(pairs.segments.lengths)
    return replace(counts, pairs=len(chosen), chosen_tokens=int(chosen.sum()))


def plan_step(
    batches: Sequence[HostBatch], max_tokens: int | None, device: torch.device, *, same_passes: bool
) -> StepPlan:
    """Count a step of this rank's batches; `same_passes`: ranks must run the model equally often (FSDP)."""
    counts = sum((counts_of(b.batch) for b in batches if b.real), Counts())
    tokens = torch.tensor([sum(b.batch.n_tokens for b in batches if b.real)])
    total = all_reduce(torch.cat([counts.to_tensor(), tokens]), device)
    passes = None
    if same_passes:
        own = torch.tensor([len(b.batch.split(max_tokens)) for b in batches])
        passes = tuple(all_reduce(own, device, "max").tolist())
    return StepPlan(Counts.from_tensor(total[:-1]), int(total[-1]), passes)


def micro_batches(batch: TokenBatch, max_tokens: int | None, passes: int | None) -> list[tuple[TokenBatch, bool]]:
    """Cut a batch into micro-batches, exactly `passes` of them if that is given.

    False marks one without weight: a rank with too few prompts runs its smallest one again.
    """
    parts = [(part, True) for part in batch.split(max_tokens, parts=passes or 1)]
    if passes is None or len(parts) == passes:
        return parts
    smallest = min((part for part, _ in parts), key=lambda part: part.n_tokens)
    return parts + [(smallest, False)] * (passes - len(parts))


# ---- From a micro-batch to losses: ask credit, reference and teacher, score the policy, apply the objective. ----


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
    logps: Tensor | None = None
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
    on_policy: bool = False  # a batch without `old_logps` was sampled from the policy as it is: they are its own

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
            measure: also measure any of "entropy", "kl", "log_ratio", "logps" (detached), and "whole": score all
                counted tokens, also those that the objective does not read, and add the metrics of whole completions.
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
        if self.on_policy and OLD_LOGPS not in batch.columns:
            own = {OLD_LOGPS: scores.logps, "entropy": scores.entropy}
            scored |= {name: value.detach() for name, value in own.items() if value is not None}
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
        if "logps" in measure:
            judged.logps = scored["logps"].detach()
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
        needed -= {OLD_LOGPS} - batch.columns.keys() if self.on_policy else set()
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
    return {"whole/accuracies": higher(chosen, rejected), "whole/margins": chosen - rejected}


# ---- Means of metrics over batches and ranks, with the right weights. ----


def wide(values: Tensor) -> Tensor:
    """`values` in float64; on the host if their device has no such numbers (Apple's)."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


class WeightedMeans:
    """Sums (float64, on the host) and weights of named quantities; `means` divides.

    A mean of batch means is wrong where batches differ in size: a quantity is added as a sum over the things it is a
    mean of (pairs, tokens), with their number as the weight.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, name: str, total: float, weight: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.weights[name] = self.weights.get(name, 0.0) + float(weight)

    def add_metrics(self, metrics: Mapping[str, Tensor], n_losses: int) -> None:
        """Add an objective's metrics: a vector is one value per pair, a scalar the mean over `n_losses` pairs."""
        if not metrics:
            return
        vectors = {name: wide(value.detach()) for name, value in metrics.items()}
        totals = torch.stack([v.sum() if v.dim() else v * n_losses for v in vectors.values()]).tolist()
        for (name, value), total in zip(vectors.items(), totals, strict=True):
            self.add(name, total, value.numel() if value.dim() else n_losses)

    def add_lengths(self, segments: Segments, chosen: Tensor | None) -> None:
        """Add counted tokens per completion; of pairs by side, `chosen` being bool `[C]`."""
        lengths = segments.lengths
        sides = {"completion": lengths} if chosen is None else {"chosen": lengths[chosen], "rejected": lengths[~chosen]}
        for side, counted in sides.items():
            self.add(f"lengths/{side}", int(counted.sum()), len(counted))

    def clear(self) -> None:
        self.sums.clear()
        self.weights.clear()

    def means(self) -> dict[str, float]:
        """Mean of every quantity that has weight, in order of first use."""
        return {name: total / self.weights[name] for name, total in self.sums.items() if self.weights[name] > 0}

    def reduced(self) -> WeightedMeans:
        """The sums of all ranks, which need not hold the same names."""
        ranks, out = all_gather(self.state()), WeightedMeans()
        for name in sorted({name for rank in ranks for name in rank["sums"]}):
            for rank in (rank for rank in ranks if name in rank["sums"]):
                out.add(name, rank["sums"][name], rank["weights"][name])
        return out

    def state(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "weights": dict(self.weights)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.sums, self.weights = dict(state["sums"]), dict(state["weights"])


# ---- The record of the step under way: its losses and metrics, until they are known to be finite. ----


@dataclass
class MicroRecord:
    """One micro-batch of the step, detached."""

    batch: TokenBatch
    output: LossOutput
    share: Tensor  # what it adds to the loss of the step
    entropy: Tensor | None  # nats per counted token [N]
    logps: Tensor | None = None

    @classmethod
    def of(cls, batch: TokenBatch, judged: Judged, share: Tensor) -> MicroRecord:
        out = judged.output
        tokens = out.token_losses.detach() if out.token_losses is not None else None
        output = replace(out, losses=out.losses.detach(), token_losses=tokens)
        return cls(batch, output, share.detach(), judged.entropy, judged.logps)

    def add_to(self, means: WeightedMeans) -> None:
        """Add the metrics, and the lengths, to a logging window."""
        means.add_metrics(self.output.metrics, self.output.losses.numel())
        means.add_lengths(self.batch.segments, self.batch.is_first if self.output.unit == "pairs" else None)
        if self.entropy is not None:
            means.add("entropy", float(wide(self.entropy).sum()), self.entropy.numel())

    def row_losses(self) -> list[tuple[int | str, float]]:
        """Loss of every pair (or completion) with its row; a token term is added where it belongs."""
        pairs, group, segments = self.output.unit == "pairs", self.batch.group, self.batch.segments
        if pairs and self.batch.pairs is not None:
            group, segments = group[self.batch.pairs.completions], self.batch.pairs.segments
        rows = [self.batch.rows[g] for g in (group[0::2] if pairs else group).tolist()]
        losses, extra = self.output.losses, self.output.token_losses
        if extra is not None and self.output.token_unit == "chosen_tokens":
            losses = losses + Segments(offsets_of(segments.lengths[0::2])).sum(extra)
        elif extra is not None:
            per_completion = segments.sum(extra)
            losses = losses + (sum(segments.pairs(per_completion)) if pairs else per_completion)
        return list(zip(rows, losses.tolist(), strict=True))


def totals(records: Sequence[MicroRecord]) -> Tensor:
    """Float64 `[2]` on the host: the loss, and how many of its terms are not finite."""
    if not records:
        return torch.zeros(2, dtype=torch.float64)
    share = torch.stack([wide(r.share) for r in records]).sum()
    terms = [r.output.losses.flatten() for r in records]
    terms += [r.output.token_losses.flatten() for r in records if r.output.token_losses is not None]
    bad = torch.stack([(~torch.isfinite(t)).sum() for t in terms]).sum()
    return torch.stack([share, bad.to(share)]).cpu()


def nonfinite_report(records: Sequence[MicroRecord], rank: int) -> list[dict[str, Any]]:
    """Per micro-batch its rows and losses, for `nonfinite.json`; strings where JSON has no number."""

    def entry(row: int | str, loss: float) -> dict[str, Any]:
        return {"row": row, "loss": loss if math.isfinite(loss) else str(loss)}

    return [{"rank": rank, "losses": [entry(*one) for one in record.row_losses()]} for record in records]
