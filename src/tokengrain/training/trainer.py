"""`PreferenceTrainer`: one thin subclass of `transformers.Trainer` for every offline method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from tokengrain.batch import Sample, TokenBatch
from tokengrain.errors import NonFiniteLossError, RecipeError, write_json
from tokengrain.loss import make_normaliser
from tokengrain.method import FROZEN, TAUGHT, BoundObjective, check_together
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.reference import disable_dropout, is_peft, place_reference, resolve_reference
from tokengrain.training import checks
from tokengrain.training.checkpoint import LOG_FILE, CheckpointMixin, JsonlLog, last_complete_checkpoint
from tokengrain.training.config import PreferenceConfig, endless
from tokengrain.training.evaluate import EvaluationMixin
from tokengrain.training.loss import CreditUse, Judged, PreferenceLoss, resolve_credit, resolve_objective
from tokengrain.training.step import (
    HostBatch,
    MicroRecord,
    StepPlan,
    WeightedMeans,
    all_reduce,
    micro_batches,
    plan_step,
    report,
    totals,
)

# ----------------------------------------------------------------------------------------------------
# What happens when a loss is not finite: the rows are saved, the last good state too, and the run ends.

NONFINITE_FILE = "nonfinite.json"


def check_finite(trainer: PreferenceTrainer, records: list[MicroRecord], *, losses: bool, grad_norm: Any) -> None:
    """Stop the run unless the step under way is finite. Every rank calls this with the same findings.

    Args:
        losses: whether all losses are finite, on all ranks.
        grad_norm: of the gradient; None: it was not clipped.

    Raises:
        NonFiniteLossError: a loss or the gradient is not finite.
    """
    if not losses:
        _stop(trainer, records, "loss")
    scaled = trainer.accelerator.scaler is not None  # fp16: an overflowing gradient is skipped, and normal
    if grad_norm is not None and not scaled and not torch.isfinite(_norm(grad_norm)):
        _stop(trainer, records, "gradient")


def _stop(trainer: PreferenceTrainer, records: list[MicroRecord], what: str) -> NoReturn:
    """Save the rows of the step under way and the weights before it, then raise. Every rank calls this.

    Args:
        what: "loss" or "gradient", whichever was not finite.

    Raises:
        NonFiniteLossError: always.
    """
    step = trainer.state.global_step + 1
    path = trainer.output_path / NONFINITE_FILE
    own = report(records, trainer.accelerator.process_index)
    batches = gather_object(own) if trainer.accelerator.num_processes > 1 else own
    rows = [entry["row"] for batch in batches for entry in batch["losses"]]
    culprits = [e["row"] for batch in batches for e in batch["losses"] if isinstance(e["loss"], str)]
    if trainer.is_world_process_zero():
        found = {
            "step": step,
            "not_finite": what,
            "rows": rows,
            "nonfinite_rows": culprits,
            "micro_batches": batches,
        }
        write_json(path, found)
    kept = _keep_last_good_state(trainer)
    named = f" (not finite at row {', '.join(map(str, culprits[:5]))})" if culprits else ""
    raise NonFiniteLossError(
        f"the {what} of optimiser step {step} is not finite; training stopped before the step. "
        f"Its {len(rows)} rows{named} are in {path}. {kept}"
    )


def _keep_last_good_state(trainer: PreferenceTrainer) -> str:
    """Save the weights, which the bad step has not touched, unless they are bad themselves."""
    finite = all(bool(torch.isfinite(_local(p)).all()) for p in trainer.model.parameters() if p.requires_grad)
    flags = torch.tensor([0.0 if finite else 1.0])
    good = not trainer.reduce(flags).any()
    wanted = trainer.args.save_strategy != SaveStrategy.NO and trainer.state.global_step > 0
    output_dir = trainer.output_path
    if good and wanted and not (output_dir / f"checkpoint-{trainer.state.global_step}").exists():
        trainer.model_wrapped.zero_grad()
        trainer._save_checkpoint(trainer.model, None)
    last = last_complete_checkpoint(output_dir)
    weights = "" if good else "The weights themselves were not finite. "
    return weights + (f"The last good state is {last}." if last else "There is no checkpoint.")


def _norm(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


# ----------------------------------------------------------------------------------------------------
# The policy as it will be trained: with its adapter, without dropout; and which of its adapters are saved.


def prepared_policy(model: Any, args: PreferenceConfig, peft_config: Any) -> Any:
    """`model` as it will be trained: with its new adapter, without dropout."""
    if peft_config is not None:
        model = with_adapter(model, args, peft_config)
    if args.disable_dropout:
        disable_dropout(model)
    if is_peft(model) and _checkpoints_activations(args):
        model.enable_input_require_grads()
    return model


def with_adapter(model: Any, args: PreferenceConfig, peft_config: Any) -> Any:
    """`model` with a new adapter, whose random numbers come from `args.seed`."""
    from peft import get_peft_model

    set_seed(args.seed)
    return get_peft_model(model, peft_config)


def save_active_adapter_only(model: Any) -> None:
    """Leave adapters that are only asked (a teacher's) out of what the model saves."""
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=[model.active_adapter])


def _checkpoints_activations(args: PreferenceConfig) -> bool:
    # Newer versions of transformers renamed it.
    return any(getattr(args, name, None) for name in ("activation_checkpointing", "gradient_checkpointing"))


class StepGuard(TrainerCallback):
    """Ends a run before the optimiser uses a gradient whose loss was not finite."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.finish_step()


class PreferenceTrainer(CheckpointMixin, EvaluationMixin, Trainer):
    """Trains a policy on `Sample`s: preference pairs, or single completions with the objective "sft".

    Beside what `transformers.Trainer` does: the loss of an optimiser step is normalised over all its pairs
    (or tokens), on all ranks and accumulation steps, whatever the micro-batches; checkpoints are whole or not
    there, and a killed run resumes exactly; a loss that is not finite stops the run before the optimiser does
    anything.

    Args:
        model: the policy, a causal language model of transformers or a PEFT model of one.
        args: settings.
        objective: a bound objective (`make_objective`), its name, or a loss function
            `(logps, segments, *, <quantities annotated Tensor>) -> LossOutput`.
        credit: gives the token credit, if the objective takes it: a credit source or any function
            `TokenBatch -> [N]`. None: the data's column `token_rewards`.
        credit_as: how it enters: "reward", "weight", "selection", "span", `{name: ..., settings}` or a role of
            `tokengrain.objectives.roles`. None: the only way that the objective has.
        reference: a model, a `Reference`, or None for the default: stored `ref_logps` if the data have them
            and they are enough; for an adapter the model without it (a copy of what is trained if the
            adapter was trained already or is not all that is trained); otherwise a frozen copy of the starting weights.
        teacher: what an objective that distils learns from: a `ContrastiveTeacher`, or any function
            `TokenBatch -> Teacher`.
        train_dataset, eval_dataset: map-style or iterable data sets of `Sample`s, or lists of them.
        processing_class: the tokenizer, saved with the model.
        peft_config: wrap the model in a new adapter.
        kwargs: passed on to `transformers.Trainer`: callbacks, optimizers, optimizer_cls_and_kwargs.

    Raises:
        ModelError: vocabularies that differ.
        DataError: an empty data set, rows that are not pairs, completions longer than the model's positions.
        RecipeError: settings that cannot work together.
    """

    def __init__(
        self,
        model: nn.Module,
        args: PreferenceConfig,
        *,
        objective: Any = "dpo",
        credit: Any = None,
        credit_as: Any = None,
        reference: Any = None,
        teacher: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        checks.check_arguments(args, PreferenceConfig, kwargs)
        self.objective: BoundObjective = resolve_objective(objective)
        self.normaliser = make_normaliser(args.normaliser, args.normaliser_constant)
        self._datasets = checks.by_name(train_dataset, eval_dataset)
        use = resolve_credit(credit, credit_as, self.objective, self._columns())
        check_together(self.objective, use.role if use is not None else None, teacher)
        self._check_data(model, use)
        checks.check_tokenizer(model, processing_class)
        model = prepared_policy(model, args, peft_config)
        reference = self._resolve_reference(reference, model)
        for role, source in (("reference", reference), ("guide", use and use.source), ("teacher", teacher)):
            for other in checks.models_in(source):
                checks.check_vocabulary(model, other, role)
        self._loss = PreferenceLoss(
            self.objective, reference, use, teacher=teacher, layout=args.layout, chunk_tokens=args.chunk_tokens
        )
        if teacher is not None and is_peft(model):
            save_active_adapter_only(model)
        # One process trains on one device; several need a launcher (torchrun, accelerate launch).
        args._setup_devices  # noqa: B018
        args._n_gpu = min(args._n_gpu, 1)
        self._reset_step()
        collate: Any = self._collate  # to batches that are no dicts
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=endless(train_dataset, args),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if args.fsdp and not self.is_fsdp_enabled:
            raise RecipeError("fsdp is set, but accelerate does not shard on this device, as on CPU")
        prepare(self.model, layout=args.layout)  # on its device by now, and not yet wrapped
        self._log_file = JsonlLog(self.output_path / LOG_FILE)
        self.add_callback(self._log_file)
        self.add_callback(StepGuard(self))
        self.remove_callback(PrinterCallback)
        self._reference_placed = False

    @property
    def reference(self) -> Any:
        """What the policy is compared with, or None."""
        return self._loss.reference

    @property
    def credit(self) -> CreditUse | None:
        """Where token credit comes from and how it enters; None: the data's columns, or no need of it."""
        return self._loss.credit

    def _reset_step(self) -> None:
        self._plan: StepPlan | None = None
        self._batch_index = 0
        self._records: list[MicroRecord] = []
        self._grad_norm: Any = None
        self._window = WeightedMeans()
        self._tokens_seen = 0

    def _resolve_reference(self, reference: Any, model: nn.Module) -> Any:
        """What the loss takes the reference's quantities from."""
        return resolve_reference(reference, model, self.objective.needs, self._all_have("ref_logps"))

    # ---- Data ----

    def _check_data(self, model: nn.Module, credit: CreditUse | None) -> None:
        columns = set(self.objective.needs) - FROZEN - TAUGHT
        if credit is not None:
            columns.discard(credit.role.provides)
            if (column := getattr(credit.source, "column", None)) is not None:
                columns.add(column)
        checks.check_datasets(self._datasets, model, self.objective, columns)
        train = self._datasets["train"]
        self._streaming = train is not None and not hasattr(train, "__len__")
        self._limits = (checks.model_positions(model), checks.vocabulary_size(model))

    def _columns(self) -> tuple[str, ...]:
        """Per-token columns that all data sets have, as far as it is known (a stream is not asked)."""
        known = ("token_rewards", "spans", "selected", "ref_logps")
        return tuple(column for column in known if self._all_have(column))

    def _all_have(self, column: str) -> bool:
        given = [d for d in self._datasets.values() if d is not None]
        return bool(given) and all(checks.has_column(d, column) for d in given)

    def _collate(self, samples: list[Sample]) -> HostBatch:
        for sample in samples if self._streaming else ():
            checks.check_sample(sample, *self._limits, name="train", pairs=self.objective.unit == "pairs")
        return HostBatch(TokenBatch.from_samples(samples))

    # ---- One optimiser step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[HostBatch], num_batches: int, device: torch.device
    ) -> tuple[list[HostBatch], None]:
        """The batches of one optimiser step; plans the step over all of them and all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        if batches:
            self._plan = plan_step(
                batches,
                self.args.max_tokens_per_microbatch,
                self.args.device,
                same_passes=self.is_fsdp_enabled,
            )
        self._batch_index, self._records = 0, []
        return batches, None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over one device batch, micro-batch by micro-batch.

        Returns:
            This rank's share of the step's loss times the number of ranks, so that their mean is the loss.
        """
        assert self._plan is not None
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):  # schedule-free optimisers have modes
            optimizer.train()
        self._place_reference()
        passes = self._plan.passes[self._batch_index] if self._plan.passes is not None else None
        self._batch_index += 1
        parts = micro_batches(inputs.batch, self.args.max_tokens_per_microbatch, passes)
        total = torch.zeros((), device=self.args.device)
        for index, (part, counts) in enumerate(parts):
            real = counts and inputs.real
            last = index == len(parts) - 1
            # In an earlier accumulation step transformers has switched synchronisation off around this call.
            defer = not last and self.accelerator.sync_gradients and self.accelerator.num_processes > 1
            with (
                self.accelerator.no_sync(model) if defer else nullcontext(),
                self.compute_loss_context_manager(),
            ):
                part = part.to(self.args.device)
                loss, judged = self.compute_loss(model, part, return_outputs=True)
                if real:
                    self._records.append(MicroRecord.of(part, judged, loss))
                    total += loss.detach()
                elif not inputs.real:
                    self._records.append(MicroRecord.of(part, judged, loss, real=False))
                self._backward(loss if real else loss * 0.0)
        return total * self.accelerator.num_processes

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """What one micro-batch adds to the loss of the optimiser step (and what the objective returned)."""
        assert self._plan is not None
        judged = self.judge(
            model, inputs, measure=self._measured_in_training(), frozen_context=self.accelerator.autocast
        )
        loss = self.normaliser(judged.output, self._plan.counts)
        return (loss, judged) if return_outputs else loss

    def _measured_in_training(self) -> tuple[str, ...]:
        return ("entropy",) if self.args.log_entropy else ()

    def judge(self, model: nn.Module, batch: TokenBatch, **options: Any) -> Judged:
        """Score a batch and apply the objective; see `PreferenceLoss`."""
        return self._loss(model, batch, **options)

    def _backward(self, loss: Tensor) -> None:
        # DDP and FSDP average gradients over ranks, and accelerate divides by its accumulation steps; the
        # normaliser has already divided by the counts of the whole step.
        scale = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps
        self.accelerator.backward(loss * scale)

    def _place_reference(self) -> None:
        if not self._reference_placed:
            place_reference(self.reference, self.accelerator, self.args.layout)
            self._reference_placed = True

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._grad_norm

    def finish_step(self) -> None:
        """Called between the last backward pass of a step and the optimiser.

        Raises:
            NonFiniteLossError: a loss or the gradient is not finite, on any rank.
        """
        assert self._plan is not None
        world = self.accelerator.num_processes
        own = totals(self._records)
        bad = float(self.reduce(own)[1])
        check_finite(self, self._records, losses=not bad, grad_norm=self._grad_norm)
        self._window.add("loss", float(own[0]), 1 / world)
        for record in self._records:
            record.add_to(self._window)
        self._tokens_seen += self._plan.tokens
        self._records, self._grad_norm = [], None

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks, on the host."""
        return all_reduce(values, self.args.device)

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training entry gets the window's means, weighted over batches, micro-batches and ranks."""
        if "loss" in logs and "learning_rate" in logs:
            window = self._window.reduced(self.reduce)
            self._window.clear()
            logs = {**logs, **window.means(), "num_tokens": self._tokens_seen}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """About 6 operations per parameter and token, forward and backward."""
        return 6 * sum(p.numel() for p in self.model.parameters()) * inputs.batch.n_tokens
