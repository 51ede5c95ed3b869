"""`PreferenceTrainer`: one thin subclass of `transformers.Trainer` for every offline method."""

# Which of our methods transformers' loop calls, in the order of a run:
#
#   train                checks the output folder, restores what is ours of a checkpoint, and starts the loop
#     get_batch_samples  once per optimiser step: its batches, and the counts that its loss is divided by
#     training_step      once per batch: forward and backward, micro-batch by micro-batch
#       compute_loss     once per micro-batch: score it, apply the objective, normalise
#     _get_grad_norm     after the last backward pass: keeps the norm of the clipped gradient
#     finish_step        before the optimiser: ends the run if the step is not finite, else takes up its metrics
#     after_step         after the optimiser (for online training)
#     log                every `logging_steps`: adds the means of the metrics since the last entry
#     evaluation_loop    every `eval_steps`: metrics of the whole held-out set
#     _save_checkpoint   every `save_steps`: a checkpoint that appears whole, by one rename

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import socket
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy, TrainOutput

from tokengrain.batch import Sample, TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.rows import Rows
from tokengrain.data.tokens import text_tokenizer
from tokengrain.errors import (
    DataError,
    ModelError,
    NonFiniteLossError,
    RecipeError,
    read_json,
    require,
    some,
    write_json,
    write_text,
)
from tokengrain.loss import make_normaliser
from tokengrain.method import FROZEN, TAUGHT, BoundObjective, check_together
from tokengrain.models import check_sizes, import_peft, load_model, load_reader, trained
from tokengrain.scoring.encdec import vocabularies
from tokengrain.scoring.model import evaluating, is_encoder_decoder, lift_positions, positions
from tokengrain.scoring.prepare import prepare, prompt_role, unwrapped
from tokengrain.scoring.reference import (
    AdapterOffReference,
    AdapterReference,
    ColumnReference,
    FrozenReference,
    StartingAdapterReference,
    disable_dropout,
    is_peft,
    place_reference,
    reshard,
    resolve_reference,
    shard,
)
from tokengrain.specs import ModelSpec
from tokengrain.training.card import model_card
from tokengrain.training.checkpoint import (
    LOG_FILE,
    STAGING,
    STATE_FILE,
    JsonlLog,
    check_files,
    check_same_run,
    check_shared,
    checkpoint_to_resume,
    checkpoints,
    data_fingerprint,
    has_renamed_weights,
    last_complete_checkpoint,
    no_progress_bar,
    reading,
    refuse_earlier_run,
    remove_folder,
    require_state,
    rotate,
    staged_folder,
)
from tokengrain.training.config import (
    PreferenceConfig,
    check_held_out,
    check_processes,
    check_rate,
    endless,
    launched_with,
)
from tokengrain.training.evaluate import MEASURES, WHOLE, EvalBatches, EvalSums, chosen_dataset, loop_output
from tokengrain.training.lost import naming_lost_ranks
from tokengrain.training.step import (
    CreditUse,
    HostBatch,
    MicroRecord,
    PreferenceLoss,
    StepPlan,
    WeightedMeans,
    all_gather,
    all_reduce,
    micro_batches,
    nonfinite_report,
    plan_step,
    resolve_credit,
    resolve_objective,
    totals,
)

NONFINITE_FILE = "nonfinite.json"
REFERENCE_FILE = "reference.safetensors"
"""In checkpoints: the weights of a reference that follows the policy."""

SYNC = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
SYNC_NEEDS = "sync_ref_model needs a reference with weights of its own (a copy, without lora or stored columns)"

PASSED_ON = ("callbacks", "optimizers", "optimizer_cls_and_kwargs")
"""Arguments of `transformers.Trainer` that have their meaning here; the others would be without effect."""

TRL_NAMES = {
    "ref_model": "reference",
    "tokenizer": "processing_class",
    "loss_type": "objective=make_objective('dpo', loss_type=...); `tokengrain methods` lists the objectives",
    "beta": "objective=make_objective('dpo', beta=...)",
    "reward_funcs": "rewards, of OnlineTrainer",
    "max_length": "tokenize=TokenizeConfig(max_length=...)",
    "formatting_func": "rows with prompt, chosen and rejected; data.columns of a recipe makes them by template",
}
"""What TRL's trainers call arguments that have another name or place here."""

COLUMN_HINTS = {
    "token_rewards": ", or a credit source",
    "spans": "; spans come from data.spans (diff, tags, column or a function), or from token credit",
    "selected": "; or token credit to select by",
}


class PreferenceTrainer(Trainer):
    """Trains a policy on `Sample`s: preference pairs, or single completions with the objective "sft".

    Beside what `transformers.Trainer` does: the loss of an optimiser step is normalised over all its pairs
    (or tokens), on all ranks and accumulation steps, whatever the micro-batches; checkpoints are whole or not
    there, and a killed run resumes exactly; a loss that is not finite stops the run before the optimiser does
    anything.

    Args:
        model: the policy, a causal language model or an encoder-decoder of transformers, or a PEFT model of one; or the
            name of one, which is loaded in float32 with its tokenizer.
        args: settings; None: the defaults.
        objective: a bound objective (`make_objective`), its name, or a loss function
            `(logps, segments, *, <quantities annotated Tensor>) -> LossOutput`.
        credit: gives the token credit, if the objective takes it: a credit source or any function
            `TokenBatch -> [N]`. None: the data's column `token_rewards`.
        credit_as: "reward", "weight", "selection", "span", `{name: ..., settings}` or a role of `tokengrain.loss`.
            None: the only way that the objective has.
        reference: a model, a `Reference`, or None: stored `ref_logps` if they are enough; for a new adapter the
            model without it; otherwise a frozen copy of what is trained, as it is at the start.
        teacher: what an objective that distils learns from: a `ContrastiveTeacher`, or a function
            `TokenBatch -> Teacher`.
        train_dataset, eval_dataset: rows: a name, a list of mappings, a `datasets.Dataset`, whatever `load_rows` takes;
            or map-style or iterable data sets of `Sample`s, as `prepare_pairs` makes them, or lists of them.
        processing_class: the tokenizer, or the processor of a model that sees; saved with the model.
        tokenize: how rows become tokens.
        peft_config: wrap the model in a new adapter.
        kwargs: passed on to `transformers.Trainer`: callbacks, optimizers, optimizer_cls_and_kwargs.

    Raises:
        ModelError: vocabularies that differ.
        DataError: an empty data set, rows that are not pairs, completions longer than the model's positions.
        RecipeError: settings that cannot work together.
    """

    args: PreferenceConfig
    model: nn.Module

    def __init__(
        self,
        model: Any,
        args: PreferenceConfig | None = None,
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
        tokenize: TokenizeConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or PreferenceConfig()
        check_arguments(args, PreferenceConfig, kwargs)
        model, processing_class = loaded(model, processing_class)
        self.objective: BoundObjective = resolve_objective(objective)
        self.normaliser = make_normaliser(args.normaliser, args.normaliser_constant)
        # By a name for messages; of several evaluation sets one may be called "train".
        self._role = prompt_role(model)
        tokenize = replace(tokenize or TokenizeConfig(), prompt_role=self._role)
        self._as_samples = samples = partial(as_samples, processing_class, tokenize, self.objective.unit == "pairs")
        several, train_dataset = isinstance(eval_dataset, Mapping), samples(train_dataset)
        eval_dataset = {n: samples(d) for n, d in eval_dataset.items()} if several else samples(eval_dataset)
        held_out = {f"eval_{name}": d for name, d in eval_dataset.items()} if several else {"eval": eval_dataset}
        self._datasets: dict[str, Any] = {"train": train_dataset, **held_out}
        columns = tuple(c for c in ("token_rewards", "spans", "selected", "ref_logps") if self._all_have(c))
        use = resolve_credit(credit, credit_as, self.objective, columns)
        check_together(self.objective, use.role if use is not None else None, teacher)
        longest = max((getattr(d, "max_length", None) or 0 for d in self._datasets.values()), default=0)
        lift_positions(unwrapped(model), longest)
        self._limits = Limits(model)
        self._check_data(use)
        check_held_out(args, eval_dataset)
        self._limits.check_tokenizer(processing_class and text_tokenizer(processing_class))
        policy: Any = prepared_policy(model, args, peft_config)
        given, reference = reference, self._resolve_reference(reference, policy)
        for role, source in (("reference", reference), ("guide", use and use.source), ("teacher", teacher)):
            self._limits.check_models_in(source, role)
            for other in models_in(source):
                lift_positions(unwrapped(other), longest)
        if use is not None and policy_in(use.source, policy):
            what = "the credit asks the policy itself, so that its numbers change while it is trained; give it a copy "
            warnings.warn(f"{what}(copy.deepcopy(model)) for those of the starting model", stacklevel=2)
        layout, chunk = args.layout, args.chunk_tokens
        self.judge = PreferenceLoss(self.objective, reference, use, teacher=teacher, layout=layout, chunk_tokens=chunk)
        self.judge.stored = isinstance(self.judge.reference, ColumnReference) and self._all_have("ref_logps")
        if teacher is not None and is_peft(policy):  # adapters that are only asked are not saved
            policy.save_pretrained = partial(policy.save_pretrained, selected_adapters=[policy.active_adapter])
        # One process trains on one device; several need a launcher (torchrun, accelerate launch).
        args._setup_devices  # noqa: B018
        args._n_gpu = min(args._n_gpu, 1)
        what = "fsdp is set, which needs several processes (torchrun, accelerate launch); got one"
        require(not args.fsdp or args.world_size > 1, RecipeError, what)
        check_processes(args.world_size)
        self._reset_step()
        self._own_schedule = "optimizers" not in kwargs
        kwargs |= {"train_dataset": endless(train_dataset, args), "eval_dataset": eval_dataset}
        collate: Any = self._collate  # to batches that are no dicts
        super().__init__(policy, args, data_collator=collate, processing_class=processing_class, **kwargs)
        asked = "fsdp is set" if args.fsdp else "accelerate was started with FSDP"
        done = self.is_fsdp_enabled or not (args.fsdp or launched_with("FSDP"))
        require(done, RecipeError, f"{asked}, but accelerate does not shard on this device, as on CPU")
        prepare(self.model, layout=args.layout)  # on its device by now, and not yet wrapped
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
            args.restore_callback_states_from_checkpoint = True  # how long it has waited already
        for tracker in self.callback_handler.callbacks:
            if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:
                # Its own place, which it knows only once training begins: an evaluation before would go elsewhere.
                tracker.logging_dir = str(self.output_path / "runs")
        self._log_file = JsonlLog(self.output_path / LOG_FILE)
        self.add_callback(self._log_file)
        self.callback_handler.callbacks.insert(0, StepHooks(self))  # before those that log and save
        self.remove_callback(PrinterCallback)
        self._reference_placed = False
        self.log_ratio_rms: float | None = None  # of the last evaluation, see `EvalSums`
        if args.sync_ref_model:
            check_sync(self.reference, self.model, sharded=self.is_fsdp_enabled)
            if given is not None:  # others may ask the same model
                self.reference.model = copy.deepcopy(self.reference.model)
        self._staging: Path | None = None  # where a checkpoint is being saved
        self._peers: list[tuple[str, int]] = []

    @property
    def output_path(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def reference(self) -> Any:
        """What the policy is compared with, or None."""
        return self.judge.reference

    @property
    def credit(self) -> CreditUse | None:
        """Where token credit comes from and how it enters; None: the data's columns, or no need of it."""
        return self.judge.credit

    def _reset_step(self) -> None:
        self._plan: StepPlan | None = None
        self._batch_index = 0
        self._records: list[MicroRecord] = []
        self._grad_norm: Any = None
        self._moved: bool | None = None  # whether any gradient was above 0; None: not known
        self._window = WeightedMeans()
        self._tokens_seen = 0
        self._resumed_loss: tuple[float, float] | None = None

    def _resolve_reference(self, reference: Any, model: nn.Module) -> Any:
        return resolve_reference(reference, model, self.objective.needs, self._all_have("ref_logps"))

    def _check_data(self, credit: CreditUse | None) -> None:
        """Check the rows that are at hand; a stream is checked as it is read."""
        columns = set(self.objective.needs) - FROZEN - TAUGHT
        if credit is not None:
            columns.discard(credit.role.provides)
            if (column := getattr(credit.source, "column", None)) is not None:
                columns.add(column)
        for name, dataset in self._datasets.items():
            if hasattr(dataset, "__len__"):
                where = getattr(dataset, "name", name)
                self._check_rows((dataset[i] for i in range(len(dataset))), where)
                for column in sorted(columns):
                    what = f"objective {self.objective.name} needs per-token {column}, which the rows do not have"
                    expected = "values in every row" + COLUMN_HINTS.get(column, "")
                    place: Any = {"file": where, "row": dataset[0].row, "field": f"*_{column}"}
                    require(has_column(dataset, column), DataError, what, **place, expected=expected)
        train = self._datasets["train"]
        self._streaming = train is not None and not hasattr(train, "__len__")

    def _check_rows(self, samples: Any, where: object) -> None:
        count = 0
        for count, sample in enumerate(samples, 1):  # noqa: B007
            self._limits.check_sample(sample, where, pairs=self.objective.unit == "pairs")
        require(count, DataError, "the dataset is empty", file=where, expected="at least one row")

    def _all_have(self, column: str) -> bool:
        given = [d for d in self._datasets.values() if d is not None]
        return bool(given) and all(has_column(d, column) for d in given)

    def _collate(self, samples: list[Sample]) -> HostBatch:
        for sample in samples if self._streaming else ():
            self._limits.check_sample(sample, "train", pairs=self.objective.unit == "pairs")
        return HostBatch(TokenBatch.from_samples(samples, self._role))

    def get_batch_samples(
        self, epoch_iterator: Iterator[HostBatch], num_batches: int, device: torch.device
    ) -> tuple[list[HostBatch], None]:
        """The batches of one optimiser step; plans the step over all of them and all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        if batches:
            most, device = self.args.max_tokens_per_microbatch, self.args.device
            self._plan = plan_step(batches, most, device, same_passes=self.is_fsdp_enabled)
        self._batch_index, self._records = 0, []
        return batches, None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over one device batch, micro-batch by micro-batch.

        Returns this rank's share of the step's loss times the number of ranks, so that their mean is the loss.
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
        # DDP and FSDP average gradients over ranks, and accelerate divides by its accumulation steps; the
        # normaliser has already divided by the counts of the whole step.
        scale = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps
        for index, (part, counts) in enumerate(parts):
            real = counts and inputs.real
            # In an earlier accumulation step transformers has switched synchronisation off around this call.
            defer = index < len(parts) - 1 and self.accelerator.sync_gradients and self.accelerator.num_processes > 1
            with self.accelerator.no_sync(model) if defer else nullcontext(), self.compute_loss_context_manager():
                part = part.to(self.args.device)
                loss, judged = self.compute_loss(model, part, return_outputs=True)
                if real:
                    self._records.append(MicroRecord.of(part, judged, loss))
                    total += loss.detach()
                self.accelerator.backward((loss if real else loss * 0.0) * scale)
        return total * self.accelerator.num_processes

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """What one micro-batch adds to the loss of the optimiser step (and what the objective returned)."""
        assert self._plan is not None
        measure, autocast = self._measured_in_training(), self.accelerator.autocast
        judged = self.judge(model, inputs, measure=measure, frozen_context=autocast)
        loss = self.normaliser(judged.output, self._plan.counts)
        if judged.balance is not None:  # a mean over the tokens of the step, whatever its micro-batches
            loss = loss + judged.balance * (inputs.segments.total / max(self._plan.counts.tokens, 1))
        return (loss, judged) if return_outputs else loss

    def _measured_in_training(self) -> tuple[str, ...]:
        return ("entropy",) if self.args.log_entropy else ()

    def _place_reference(self) -> None:
        if not self._reference_placed:
            place_reference(self.reference, self.accelerator, self.args.layout)
            self._reference_placed = True

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._grad_norm

    def finish_step(self) -> None:
        """Called before the optimiser's step: raises NonFiniteLossError if a loss or the gradient is not finite."""
        assert self._plan is not None
        own = totals(self._records)
        if float(all_reduce(own, self.args.device)[1]):
            self._stop("loss")
        norm = 0.0 if self._grad_norm is None else self._grad_norm
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded
        scaled = self.accelerator.scaler is not None  # fp16: an overflowing gradient is skipped, and normal
        if not scaled and not math.isfinite(norm):
            self._stop("gradient")
        self._window.add("loss", float(own[0]), 1 / self.accelerator.num_processes)
        for record in self._records:
            record.add_to(self._window)
        self._tokens_seen += self._plan.tokens
        if self._grad_norm is not None:  # else nobody asked for it
            self._moved = bool(self._moved) or float(norm) != 0  # NaN, of fp16, is not 0
        self._records, self._grad_norm = [], None

    def _warn_of_no_gradient(self) -> None:
        if self._moved is False:
            what = "nothing was learned: the gradient was 0 at every step. Are all margins of a hinge met, does a "
            what += "selection by `above` leave no token on one side of every pair, or are all token weights 0?"
            warnings.warn(what, stacklevel=2)

    def after_step(self) -> None:
        """Called after the optimiser's step, before anything is logged or saved."""
        if self.args.sync_ref_model and self.state.global_step % self.args.ref_model_sync_steps == 0:
            self.reference.move(self.model, self.args.ref_model_mixup_alpha)

    # ---- A step that is not finite: its rows and the last good state are saved, and the run ends ----

    def _stop(self, what: str) -> NoReturn:
        """Save the rows of the step under way and the weights before it, then raise. Every rank calls this."""
        step = self.state.global_step + 1
        own = nonfinite_report(self._records, self.accelerator.process_index)
        batches = [batch for rank in all_gather(own) for batch in rank]
        entries = [entry for batch in batches for entry in batch["losses"]]
        rows, culprits = [e["row"] for e in entries], [e["row"] for e in entries if isinstance(e["loss"], str)]
        path = self.output_path / NONFINITE_FILE
        if self.is_world_process_zero():
            found = {"step": step, "not_finite": what, "rows": rows, "nonfinite_rows": culprits}
            write_json(path, {**found, "micro_batches": batches})
        # The bad step has not touched the weights: they are saved, unless they are bad themselves.
        good, wanted = not self._nonfinite_weights(), self.args.save_strategy != SaveStrategy.NO and step > 1
        if good and wanted and not (self.output_path / f"checkpoint-{step - 1}").exists():
            self.model_wrapped.zero_grad()
            self._save_checkpoint(self.model, None)
        last_state = ("" if good else "The weights themselves were not finite. ") + self._last_good_state()
        named = f" (not finite at row {', '.join(map(str, culprits[:5]))})" if culprits else ""
        raise NonFiniteLossError(
            f"the {what} of optimiser step {step} is not finite; training stopped before the step. "
            f"Its {len(rows)} rows{named} are in {path}. {last_state}"
        )

    def _last_good_state(self) -> str:
        last = last_complete_checkpoint(self.output_path)
        return f"The last good state is {last}." if last else "There is no checkpoint."

    def _check_weights(self) -> None:
        """Called before weights are saved. The loss of the next step would tell, but there may be none."""
        if bad := self._nonfinite_weights():
            raise NonFiniteLossError(
                f"after optimiser step {self.state.global_step} the weights themselves were not finite: "
                f"{some(bad, 3)}; they are not saved. {self._last_good_state()}"
            )

    def _nonfinite_weights(self) -> list[str]:
        """Names of trained weights that are not finite, on all ranks."""
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        parts = ((name, p.to_local() if hasattr(p, "to_local") else p) for name, p in trained)
        own = [name for name, part in parts if not bool(torch.isfinite(part).all())]
        return sorted({name for names in all_gather(own) for name in names})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training entry gets the window's means, weighted over batches, micro-batches and ranks."""
        if "loss" in logs and "learning_rate" in logs:
            window = self._window.reduced()
            self._window.clear()
            logs = {**logs, **window.means(), "num_tokens": self._tokens_seen}
        elif "train_loss" in logs:  # of the whole run; transformers divides by the steps since it was resumed
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """About 6 operations per parameter and token, forward and backward."""
        return 6 * sum(p.numel() for p in self.model.parameters()) * inputs.batch.n_tokens

    # ---- Evaluation on the whole set, whatever the batches and ranks ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """This rank's share of the evaluation set, in micro-batches."""
        dataset = self._as_samples(chosen_dataset(self, eval_dataset))
        samples = [dataset[i] for i in range(len(dataset))] if hasattr(dataset, "__len__") else list(dataset)
        self._check_rows(samples, getattr(dataset, "name", "eval"))
        batch_size, most = self.args.per_device_eval_batch_size, self.args.max_tokens_per_microbatch
        batches = partial(EvalBatches, samples, batch_size, most, role=self._role, device=self.args.device)
        return batches(rank=self.accelerator.process_index, world=self.accelerator.num_processes)

    def evaluation_model(self) -> nn.Module:
        """The policy as evaluation runs it: sharded under FSDP2, else without wrapper."""
        if self.accelerator.is_fsdp2 and not self.accelerator._models:
            shard(self.model, self.accelerator)  # evaluation before training; `train` finds it sharded
        self._place_reference()
        return self.model

    def evaluation_loop(self, dataloader: Any, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> EvalLoopOutput:
        """Metrics of the whole evaluation set; see `EvalSums`."""
        self.callback_handler.eval_dataloader = dataloader
        model, mixed_precision, sums = self.evaluation_model(), self.accelerator.autocast, EvalSums()
        with evaluating(model):
            for index, host in enumerate(dataloader):
                batch = host.batch.to(self.args.device)
                with mixed_precision():
                    judged = self.judge(self.model, batch, measure=(*MEASURES, WHOLE), frozen_context=mixed_precision)
                sums.add(batch, judged, real=index < dataloader.n_real)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self.accelerator.is_fsdp2:
            reshard(model)
        metrics = sums.metrics(self.args.normaliser, self.args.device)
        self.log_ratio_rms = sums.log_ratio_rms(self.args.device)
        return loop_output(metrics, metric_key_prefix, dataloader.n_samples)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Raises `RecipeError` if evaluation has no such metric."""
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            wanted, known = self.args.metric_for_best_model, ", ".join(name.removeprefix("eval_") for name in metrics)
            raise RecipeError(f"metric_for_best_model is {wanted!r}; evaluation gives {known}") from error

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RecipeError(
            "there is no predict: evaluate(rows) gives their metrics, tokengrain.score the log-probabilities of their "
            "tokens, and a sampler of tokengrain.rollout completions"
        )

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: True: resume from the last complete checkpoint in `output_dir`, or start if
                there is none. A path: resume from there. None or False: start from scratch.

        Raises:
            RunError: starting where checkpoints lie; resuming from another run's, or from weights alone.
            NonFiniteLossError: a loss that is not finite; the batch's rows are in `nonfinite.json`.
            ModelError: nothing in the model can be trained.
        """
        trained(self.model)
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.output_path)
        self._reset_step()
        eval_on_start = self.args.eval_on_start
        if checkpoint is None:
            self._start_clean()
        else:
            self._restore(checkpoint)
            self._moved = True  # perhaps before the checkpoint
            self.args.eval_on_start = False  # the first attempt has done it
        if self.is_world_process_zero():
            shutil.rmtree(self.output_path / STAGING, ignore_errors=True)  # what a killed run left
        if self.accelerator.num_processes > 1 and self.args.save_strategy != SaveStrategy.NO:
            check_shared(self.output_path, all_gather)
        try:
            with self._together():
                output = super().train(str(checkpoint) if checkpoint else None, trial, ignore_keys_for_eval)
                self._check_weights()
                self._warn_of_no_gradient()
        finally:
            self.args.eval_on_start = eval_on_start
        return output._replace(training_loss=output.metrics["train_loss"])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._together():
            return super().evaluate(*args, **kwargs)

    def _together(self) -> AbstractContextManager[None]:
        """Around what all ranks do: if one is gone, the error of the others names it."""
        if self.is_in_train:
            return nullcontext()
        self._peers = self._peers or all_gather((socket.gethostname(), os.getpid()))
        return naming_lost_ranks(self._peers)

    def on_train_begin(self) -> None:
        """Called before the first step, which must not be without effect, like all after it.

        Takes up the sums of losses that transformers starts at 0.
        """
        if self._own_schedule and self.args.learning_rate:  # 0 by hand is what it says, as in transformers
            check_rate(self.args, self.state.max_steps)
        if self._resumed_loss is not None:
            self._total_loss_scalar, since = self._resumed_loss
            self._tr_loss += since
            self._resumed_loss = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own takes a step before it asks whether all are done, as after a kill behind the last one.

        Nor does it remember that early stopping has ended the run.
        """
        waits = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        for one in waits:  # a checkpoint has the patience of its own run
            one.early_stopping_patience = self.args.early_stopping_patience or one.early_stopping_patience
        stopped = any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in waits)
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _start_clean(self) -> None:
        if not self.args.overwrite_output_dir:
            refuse_earlier_run(self.output_path)  # on every rank: one that waits for another would hang
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            for path in checkpoints(self.output_path):
                remove_folder(path)
            self._log_file.restart(None)

    def _restore(self, checkpoint: Path) -> None:
        check_files(checkpoint)
        with reading(checkpoint, "its state: "):
            self._take_up(checkpoint, read_json(checkpoint / STATE_FILE))

    def _take_up(self, checkpoint: Path, state: dict[str, Any]) -> None:
        for name, written in state.get("template_time", {}).items():
            dataset: Any = self._datasets.get(name)
            if hasattr(dataset, "set_time"):
                dataset.set_time(datetime.fromisoformat(written))
        check_same_run(state["run"], self.run_identity(), checkpoint)
        require_state(checkpoint, state["step"])
        self._tokens_seen, self._resumed_loss = state["tokens_seen"], tuple(state["loss"])
        if self.is_world_process_zero():
            self._window.load_state(state["window"])  # the sum over ranks
            self._log_file.restart(state["step"])
        if self.args.sync_ref_model:
            self.reference.model.load_state_dict(load_file(checkpoint / REFERENCE_FILE), strict=False)
        self.restore_extra(checkpoint, state["extra"])

    def run_identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be this run's."""
        prompts = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return {
            "objective": self.objective.describe(),
            "credit": self.credit.describe() if self.credit is not None else None,
            "data": data_fingerprint(self.train_dataset),
            "prompts_per_step": prompts * self.accelerator.num_processes,
            **{n: getattr(self.args, n) for n in ("normaliser", "normaliser_constant", "seed", "data_seed")},
            **{n: getattr(self.args, n) for n in SYNC if self.args.sync_ref_model},
        }

    def save_extra(self, staged: Path) -> dict[str, Any]:
        """For subclasses: write further files into the checkpoint, on every rank.

        What the main process returns (JSON-like) goes into the state file.
        """
        return {}

    def restore_extra(self, checkpoint: Path, extra: dict[str, Any]) -> None:
        """For subclasses: take up what `save_extra` left; every rank calls this, before training begins."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any) -> None:
        with reading(Path(resume_from_checkpoint), "its weights: "):
            if not self._load_renamed(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, *args)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint), "its optimiser: ") if checkpoint else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint), "its random state: ") if checkpoint else nullcontext():
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed(str(self.state.best_model_checkpoint))

    def _load_renamed(self, checkpoint: str) -> bool:
        """Load weights that only `from_pretrained` can; whether they are such."""
        renamed = has_renamed_weights(Path(checkpoint), self.model)
        if renamed:
            # transformers renames weights when it saves some architectures (GPT-NeoX's head, Qwen2-VL) and its trainer
            # does not name them back.
            own: Any = self.model
            with no_progress_bar():
                loaded = type(own).from_pretrained(checkpoint, config=own.config, dtype=own.dtype)
            own.load_state_dict(loaded.state_dict())
        return renamed

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into a staging folder, sync, rename. All ranks call this."""
        run_dir = Path(self._get_output_dir(trial))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        self._check_weights()
        main, window = self.args.should_save, self._window.reduced()
        since = float(all_reduce(self._tr_loss.detach().cpu().double(), self.args.device))
        loss = self._total_loss_scalar, since / self.accelerator.num_processes
        # Continued or resumed, the main process counts on from the sum: rounding is the same.
        self._window.load_state(window.state() if self.is_world_process_zero() else WeightedMeans().state())
        # Rotation has to wait until the new checkpoint is in place.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        what, wait = f"checkpoint {self.state.global_step}", self.accelerator.wait_for_everyone
        try:
            with staged_folder(target, what, main=main, wait=wait) as staged:
                self._staging = staged.parent
                super()._save_checkpoint(model, trial)
                extra = self.save_extra(staged)
                if self.args.sync_ref_model and main:
                    own = {name: p.detach().contiguous() for name, p in self.reference.model.named_parameters()}
                    save_file(own, staged / REFERENCE_FILE)
                # The best one's name in this folder, which may have been moved: each rank loads it at the end.
                best = run_dir / f"checkpoint-{self.state.best_global_step}"
                if self.state.best_global_step and (best == target or best.is_dir()):
                    self.state.best_model_checkpoint = str(best)
                if main:
                    self._write_state(staged, window, loss, extra)
        finally:
            self._staging, self.args.save_total_limit = None, limit
        if main:
            rotate(run_dir, limit, self.state.best_model_checkpoint)
        wait()

    def _write_state(
        self, staged: Path, window: WeightedMeans, loss: tuple[float, float], extra: dict[str, Any]
    ) -> None:
        """Write what a run needs to resume exactly: of losses, their sum until the log's last entry and since."""
        self.state.save_to_json(str(staged / TRAINER_STATE_NAME))  # again: the best checkpoint has its name now
        state = {
            "step": self.state.global_step,
            "run": self.run_identity(),
            "window": window.state(),
            "tokens_seen": self._tokens_seen,
            "template_time": {  # of a chat template that writes the date
                name: clock.now.isoformat()
                for name, dataset in self._datasets.items()
                if (clock := getattr(dataset, "clock", None)) is not None
            },
            "loss": loss,
            "extra": extra,
        }
        write_text(staged / STATE_FILE, json.dumps(state, indent=2))  # sums may be NaN, and must come back so

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights, config and tokenizer; beside the target first, so that no part is taken for the whole."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        target = Path(output_dir) if output_dir is not None else self.output_path
        main, wait = self.args.should_save, self.accelerator.wait_for_everyone
        with staged_folder(target, f"the model {target.name}", main=main, wait=wait, replace_files=True) as staged:
            super().save_model(str(staged), _internal_call=True)

    def create_model_card(self, *args: Any, **settings: Any) -> None:
        """Write the model card into the output folder, for `push_to_hub`; see `tokengrain.training.card`.

        It takes `model_name` alone of what transformers' own takes: the rest is known of the run.
        """
        name = settings.pop("model_name", None) or self.output_path.name
        found = ", ".join(map(str, [*args, *settings]))
        require(not found, RecipeError, f"the model card takes no {found}; expected model_name alone")
        if self.is_world_process_zero():
            write_text(self.output_path / "README.md", model_card(self, name=name))


class StepHooks(TrainerCallback):
    """Calls the trainer's own methods at the start, and before and after the optimiser's step."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.on_train_begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.finish_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()


def with_adapter(model: Any, args: PreferenceConfig, peft_config: Any) -> Any:
    """`model` with a new adapter, whose random numbers come from `args.seed`."""
    what = f"peft_config is a {type(peft_config).__name__}; expected a configuration of peft, such as LoraConfig(r=16)"
    require(isinstance(peft_config, import_peft().PeftConfig), RecipeError, what)
    set_seed(args.seed)
    start = str(getattr(peft_config, "init_lora_weights", ""))
    what = f"init_lora_weights {start!r} changes the base by random numbers, drawn anew when the adapter is loaded"
    require("niter" not in start, ModelError, f"{what}; expected 'pissa'")
    return import_peft().get_peft_model(model, peft_config)


def prepared_policy(model: Any, args: PreferenceConfig, peft_config: Any) -> Any:
    """`model` as it will be trained: with its new adapter, without dropout."""
    model = with_adapter(model, args, peft_config) if peft_config is not None else model
    if args.disable_dropout:
        disable_dropout(model)
    if is_peft(model) and (getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing):
        model.enable_input_require_grads()
    return model


def check_sync(reference: Any, policy: nn.Module, *, sharded: bool) -> None:
    """Check that a reference can follow the policy: its weights are its own, and of the same names and shapes."""
    found = "none is asked" if reference is None else f"got {type(reference).__name__}"
    require(isinstance(reference, FrozenReference), RecipeError, f"{SYNC_NEEDS}; {found}")
    ours, theirs = ({n: p.shape for n, p in m.named_parameters()} for m in (policy, reference.model))
    require(ours == theirs, RecipeError, "sync_ref_model: the reference's weights differ from the policy's in kind")
    require(not sharded, RecipeError, "sync_ref_model does not work with fsdp; expected every process with a copy")


def check_arguments(args: Any, kind: type, given: Collection[str]) -> None:
    """Check the settings' class, and the names of arguments for `transformers.Trainer`: others would be ignored."""
    what = f"the trainer's settings are {type(args).__name__}; expected {kind.__name__}"
    what += ", and a second model as reference=..." if isinstance(args, nn.Module) else ""
    require(isinstance(args, kind), RecipeError, what)
    for name in (name for name in TRL_NAMES if name in given):
        raise RecipeError(f"the trainer takes no {name}; what TRL calls {name} is here: {TRL_NAMES[name]}")
    if unknown := sorted(set(given) - set(PASSED_ON)):
        raise RecipeError(
            f"the trainer takes no {', '.join(unknown)}; expected its own arguments, or {', '.join(PASSED_ON)}, which "
            "go to transformers. Objective and credit make the loss; evaluation has its own metrics and no predictions"
        )


def loaded(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """`(model, tokenizer)`, loaded if the model is given by its name (an adapter is trained on)."""
    if not isinstance(model, (str, os.PathLike)):
        return model, tokenizer
    spec = ModelSpec(path=str(model))
    tokenizer = load_reader(spec, str(model)) if tokenizer is None else tokenizer
    return load_model(spec, str(model), train_adapter=True), tokenizer


def as_samples(tokenizer: Any, config: TokenizeConfig | None, pairs: bool, data: Any) -> Any:
    """Rows of text, whatever holds them, as samples; data sets of samples as they are."""
    if isinstance(data, Mapping):
        what = f"the rows are a {type(data).__name__} of {', '.join(map(repr, data))}"
        raise DataError(f"{what}; expected a list of rows or one data set, such as data['train']")
    what, expected = f"the rows are a {type(data).__name__}, which can be read once", "rows as a list, or their file"
    require(not isinstance(data, Iterator), DataError, what, expected=expected)
    library = type(data).__module__.split(".")[0]
    data = data.to_dict("records") if library == "pandas" and hasattr(data, "columns") else data
    text = isinstance(data, (str, os.PathLike, Rows)) or library == "datasets"
    if not text and not (isinstance(data, Sequence) and len(data) and isinstance(data[0], Mapping)):
        return data
    what = "rows of text need a tokenizer (processing_class) to become samples"
    require(tokenizer is not None, RecipeError, what)
    return (prepare_pairs if pairs else prepare_sft)(data, tokenizer, config)


def has_column(dataset: Any, column: str) -> bool:
    """Whether the first row has this per-token column. A stream is not asked: it would be used up."""
    if not hasattr(dataset, "__len__") or not len(dataset):
        return False
    return column in _as_sample(dataset[0], getattr(dataset, "name", "train")).completions[0].columns


def _as_sample(row: Any, where: object) -> Sample:
    if isinstance(row, Sample):
        return row
    expected = "rows of text as a list, a file, a data set of `datasets` or of pandas; or Samples, which prepare_pairs "
    expected += "and prepare_sft of tokengrain.data make of any rows"
    raise DataError("a row is not tokenised", file=where, value=type(row).__name__, expected=expected)


class Limits:
    """What a model can read: the longest sequence in tokens, and the ids that it knows. None: not known."""

    def __init__(self, model: Any) -> None:
        inner = unwrapped(model)
        self.positions, self.whose = positions(inner), "the model's positions"
        self.vocabulary = self.prompt_vocabulary = vocabulary_size(model)
        self.apart = is_encoder_decoder(inner)  # prompt and completion stand in sequences of their own
        if self.apart:
            self.prompt_vocabulary, _ = vocabularies(inner)

    def check_sample(self, sample: Any, where: object, *, pairs: bool) -> None:
        """Raise DataError if a row is no `Sample`, not a pair where pairs are needed, or does not fit the model."""
        count = len(_as_sample(sample, where).completions)
        if pairs and count < 2:
            what, expected = "a preference pair has two completions", "a chosen one, then the rejected ones"
            raise DataError(what, file=where, row=sample.row, value=count, expected=expected)
        fields = ("chosen", *("rejected",) * (count - 1)) if count > 1 else ("completion",) * count
        for field, completion in zip(fields, sample.completions, strict=True):
            lengths = len(sample.prompt_ids), len(completion.ids)
            length = max(lengths) if self.apart else sum(lengths)
            self.check_length(length, f"{length} tokens", "; set max_length", file=where, row=sample.row, field=field)
            self.check_ids(completion.ids, file=where, row=sample.row, field=field)
        self.check_ids(sample.prompt_ids, self.prompt_vocabulary, file=where, row=sample.row, field="prompt")

    def check_length(self, length: int, shown: str, hint: str, **where: Any) -> None:
        """Raise DataError if a sequence of prompt and completion is longer than the model's positions."""
        if self.positions is not None and length > self.positions:
            joint = "prompt or completion is" if self.apart else "prompt and completion are"
            what = f"{joint} longer than {self.whose}"
            raise DataError(what, **where, value=shown, expected=f"at most {self.positions}{hint}")

    def check_ids(self, ids: list[int], vocabulary: int | None = None, **where: Any) -> None:
        """Raise DataError if there is a token id that the model does not have (None: for completions)."""
        largest, size = max(ids, default=0), vocabulary or self.vocabulary
        if size is not None and largest >= size:
            what = "a token id is outside the model's vocabulary"
            expected = f"less than {size}; is this the model's own tokenizer?"
            raise DataError(what, **where, value=largest, expected=expected)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Warn if the tokenizer has ids that the model does not have: rows must not use them."""
        if self.vocabulary is not None and hasattr(tokenizer, "__len__"):
            what = f"the tokenizer has {len(tokenizer)} tokens, the model a vocabulary of {self.vocabulary}"
            check_sizes(len(tokenizer), self.vocabulary, what)

    def check_models_in(self, source: Any, role: str) -> None:
        """Raise ModelError if a model that a reference or a credit source holds has another vocabulary."""
        for theirs in map(vocabulary_size, models_in(source)):
            what = f"the {role} has a vocabulary of {theirs} tokens, the policy of {self.vocabulary}"
            same = None in (self.vocabulary, theirs) or theirs == self.vocabulary
            require(same, ModelError, f"{what}; they must be the same")


def vocabulary_size(model: Any) -> int | None:
    """Rows of the model's output head; None if they are not known."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and getattr(head, "weight", None) is not None:
        return int(head.weight.shape[0])
    config = getattr(model, "config", None)
    return getattr(config.get_text_config(), "vocab_size", None) if config is not None else None


def policy_in(source: Any, policy: nn.Module) -> bool:
    """Whether a credit source asks weights that are trained, and not with the adapter switched off."""
    moving = {id(weight) for weight in policy.parameters() if weight.requires_grad}
    if isinstance(source, (AdapterReference, AdapterOffReference, StartingAdapterReference)):
        return False
    held = list(getattr(source, "__dict__", {}).values())
    asked = [weight for value in held if isinstance(value, nn.Module) for weight in value.parameters()]
    inside = [value for value in held if type(value).__module__.startswith("tokengrain.")]
    return any(id(weight) in moving for weight in asked) or any(policy_in(value, policy) for value in inside)


def models_in(source: Any) -> list[nn.Module]:
    """Language models in a credit source or reference; none in one with a tokenizer of its own (`own_vocabulary`)."""
    if getattr(source, "own_vocabulary", False):
        return []
    found = []
    for value in vars(source).values() if hasattr(source, "__dict__") else ():
        if isinstance(value, nn.Module):
            found += [value] if hasattr(value, "config") else []
        elif type(value).__module__.startswith("tokengrain."):
            found += models_in(value)
    return found
