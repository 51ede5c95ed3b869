"""Samplers that are not this process: give them the policy's present weights."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokengrain.training.online.trainer import OnlineTrainer

SAMPLER_FOLDER = ".sampler"


def refresh_sampler(trainer: OnlineTrainer) -> None:
    """Save the policy (or its adapter) and have the server load it. All ranks call this.

    Nothing happens for a sampler that uses the model itself, or a server that is not to be refreshed.
    """
    sampler = trainer.sampler
    server: Any = getattr(sampler, "sampler", sampler)  # under one that branches
    if getattr(server, "how", "none") == "none":
        return
    folder = trainer.output_path / SAMPLER_FOLDER

    def load() -> tuple[str | None, int] | None:
        if not trainer.is_world_process_zero():
            return None
        shutil.rmtree(folder, ignore_errors=True)
        trainer.model.save_pretrained(folder)  # type: ignore[operator]  # a PreTrainedModel or PeftModel
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        sampler.refresh(folder)  # the server may read it again: it stays until the next one
        return server.adapter, server.version

    # Other ranks ask the same server, for the adapter under its new name.
    found = next(f for f in trainer.ranks.exchange(trainer.ranks.together(load)) if f is not None)
    server.adapter, server.version = found
