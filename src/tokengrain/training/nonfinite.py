"""What happens when a loss is not finite: the rows are saved, the last good state too, and the run ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import SaveStrategy

from tokengrain.errors import NonFiniteLossError
from tokengrain.files import write_json
from tokengrain.training.checkpoints import last_complete_checkpoint
from tokengrain.training.steps import MicroRecord, report

if TYPE_CHECKING:
    from tokengrain.training.trainer import PreferenceTrainer

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
