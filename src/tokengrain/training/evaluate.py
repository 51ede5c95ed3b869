"""Evaluation on held-out rows: sums over the whole set, on all ranks, divided once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from tokengrain.batch import Sample, TokenBatch
from tokengrain.errors import DataError, RecipeError
from tokengrain.evaluation.statistics import wilson
from tokengrain.loss import Counts, LossOutput, make_normaliser
from tokengrain.method import BoundObjective
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.reference import reshard, shard
from tokengrain.training.checks import check_samples
from tokengrain.training.loss import Judged
from tokengrain.training.step import HostBatch, WeightedMeans, add_lengths, add_metrics, all_reduce, counts_of, wide

if TYPE_CHECKING:
    from tokengrain.training.config import PreferenceConfig

MEASURES = ("entropy", "kl", "log_ratio")
WHOLE = "whole"
"""Measured as well: what the policy prefers when all tokens count, also those an objective does not read."""


class EvalBatches:
    """This rank's share of an evaluation set, cut into micro-batches.

    Args:
        samples: the whole set; rank r takes rows r, r + world, ...
        batch_size: prompts per micro-batch, at most.
        max_tokens: tokens per micro-batch, at most (see `TokenBatch.split`).
        device: for the exchange between ranks.

    Attributes:
        n_samples: rows in the whole set.
        n_real: micro-batches that count. Those after it repeat one, so that all ranks run the model equally
            often; they have no weight.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        batch_size: int,
        max_tokens: int | None,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.n_samples = len(samples)
        own = [samples[i] for i in range(rank, len(samples), world)]
        batches = [TokenBatch.from_samples(own[i : i + batch_size]) for i in range(0, len(own), batch_size)]
        self._parts = [HostBatch(part) for batch in batches for part in batch.split(max_tokens)]
        self.n_real = len(self._parts)
        passes = int(all_reduce(torch.tensor([self.n_real]), device, "max"))
        filler = self._parts[-1] if own else HostBatch(TokenBatch.from_samples([samples[0]]))
        self._parts += [filler] * (passes - self.n_real)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[HostBatch]:
        return iter(self._parts)


def meant(trainer: Trainer, eval_dataset: Any) -> Any:
    """The data that `Trainer.evaluate` was asked for: these, one of several by name, or the trainer's own.

    Raises:
        DataError: there are none.
    """
    own: Any = trainer.eval_dataset
    dataset = own[eval_dataset] if isinstance(eval_dataset, str) else own if eval_dataset is None else eval_dataset
    if dataset is None:
        raise DataError("evaluation needs an eval_dataset")
    return dataset


def evaluated(metrics: Mapping[str, float], prefix: str, count: int) -> EvalLoopOutput:
    """What an evaluation loop returns: metrics under their prefix, of `count` samples; no predictions are kept."""
    nothing: Any = None
    return EvalLoopOutput(nothing, nothing, {f"{prefix}_{name}": value for name, value in metrics.items()}, count)


class EvalSums:
    """What evaluation adds up, and the metrics made of it."""

    def __init__(self) -> None:
        self.means = WeightedMeans()
        self.counts = Counts()
        self.losses = torch.zeros(2, dtype=torch.float64)  # sums of the per-pair and of the token terms
        self.units: tuple[Any, Any] = ("pairs", "chosen_tokens")

    def add(self, batch: TokenBatch, judged: Judged, real: bool) -> None:
        """Add a micro-batch; one that is not real adds its names without weight."""
        out, means = judged.output, WeightedMeans()
        add_metrics(means, out.metrics, out.losses.numel())
        add_lengths(means, batch.segments, out.unit == "pairs")
        for name in MEASURES:
            values = getattr(judged, name)
            if values is not None:
                _add_tokens(means, name, wide(values), batch, out.unit == "pairs")
        self.units = (out.unit, out.token_unit)
        if not real:
            self.means.merge(means.scaled(0.0))
            return
        self.means.merge(means)
        self.counts = self.counts + counts_of(batch)
        extra = wide(out.token_losses).sum() if out.token_losses is not None else torch.zeros(())
        self.losses += torch.stack([wide(out.losses).sum().cpu(), extra.double().cpu()])

    def metrics(self, normaliser: str, device: torch.device) -> dict[str, float]:
        """Metrics of the whole set: `loss`, the objective's own, accuracy with 95 % interval, measures."""
        losses = all_reduce(self.losses, device)
        counts = Counts.from_tensor(all_reduce(self.counts.to_tensor(), device))
        means = self.means.reduced(lambda values: all_reduce(values, device))
        # A sum over an evaluation set, or one over a constant meant for a step, says nothing: use the mean.
        name: Any = normaliser if normaliser in ("mean", "token_mean") else "mean"
        output = LossOutput(losses[:1], {}, losses[1:], *self.units)
        found = {"loss": float(make_normaliser(name)(output, counts)), **means.means()}
        # Tokens that were selected with the labels in hand rank pairs too well: whole completions are what counts.
        ranked = next((name for name in ("whole/accuracies", "rewards/accuracies") if name in found), None)
        if ranked is not None:
            share = wilson(means.sums[ranked], counts.pairs)
            found |= {"accuracy": share.value, "accuracy_low": share.low, "accuracy_high": share.high}
        if "nll/token" in found:  # sft: all of its losses are negative log-likelihoods
            found["perplexity"] = math.exp(min(float(losses.sum()) / max(counts.tokens, 1), 700.0))
        return found


def _add_tokens(means: WeightedMeans, name: str, values: torch.Tensor, batch: TokenBatch, pairs: bool) -> None:
    """Token means of a measure: over all counted tokens, and by side for pairs."""
    means.add(name, float(values.sum()), values.numel())
    if pairs:
        for side, mask in (("chosen", batch.segments.is_chosen), ("rejected", ~batch.segments.is_chosen)):
            means.add(f"{name}_per_token/{side}", float(values[mask].sum()), int(mask.sum()))


class EvaluationMixin(Trainer):
    """Overrides of `transformers.Trainer` that evaluate on the whole set, whatever the batches and ranks."""

    if TYPE_CHECKING:  # what PreferenceTrainer adds
        args: PreferenceConfig
        objective: BoundObjective
        model: nn.Module

        def judge(self, model: nn.Module, batch: TokenBatch, **options: Any) -> Judged: ...

        def _place_reference(self) -> None: ...

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """This rank's share of the evaluation set, in micro-batches.

        Raises:
            DataError: there is no such set, it is empty, or a row does not fit the model.
        """
        dataset = meant(self, eval_dataset)
        samples = [dataset[i] for i in range(len(dataset))] if hasattr(dataset, "__len__") else list(dataset)
        pairs = self.objective.unit == "pairs"
        check_samples(samples, self.model, name=getattr(dataset, "name", "eval"), pairs=pairs)
        return EvalBatches(
            samples,
            batch_size=self.args.per_device_eval_batch_size,
            max_tokens=self.args.max_tokens_per_microbatch,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            device=self.args.device,
        )

    def evaluation_model(self) -> nn.Module:
        """The policy as evaluation runs it: sharded under FSDP2, else without wrapper."""
        if self.accelerator.is_fsdp2 and not self.accelerator._models:
            shard(self.model, self.accelerator)  # evaluation before training; `train` finds it sharded
        self._place_reference()
        return self.model

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Metrics of the whole evaluation set; see `EvalSums`."""
        self.callback_handler.eval_dataloader = dataloader
        model = self.evaluation_model()
        with evaluating(model):
            sums = self._sums(dataloader)
        if self.accelerator.is_fsdp2:
            reshard(model)
        metrics = sums.metrics(self.args.normaliser, self.args.device)
        return evaluated(metrics, metric_key_prefix, dataloader.n_samples)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Raises `RecipeError` if evaluation has no such metric."""
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            wanted, known = self.args.metric_for_best_model, ", ".join(name.removeprefix("eval_") for name in metrics)
            raise RecipeError(f"metric_for_best_model is {wanted!r}; evaluation gives {known}") from error

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `RecipeError`: evaluation keeps no predictions."""
        raise RecipeError(
            "there is no predict: evaluate(rows) gives their metrics, tokengrain.score the log-probabilities of their "
            "tokens, and a sampler of tokengrain.rollout completions"
        )

    def _sums(self, batches: EvalBatches) -> EvalSums:
        sums, mixed_precision = EvalSums(), self.accelerator.autocast
        for index, host in enumerate(batches):
            batch = host.batch.to(self.args.device)
            with mixed_precision():
                judged = self.judge(self.model, batch, measure=(*MEASURES, WHOLE), frozen_context=mixed_precision)
            sums.add(batch, judged, real=index < batches.n_real)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return sums
