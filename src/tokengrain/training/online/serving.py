"""Samplers that are not this process: give them the policy's present weights."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from tokengrain.errors import RecipeError
from tokengrain.training.checkpointing import no_progress_bar
from tokengrain.training.reference import is_peft

if TYPE_CHECKING:
    from tokengrain.training.online.trainer import OnlineTrainer

SAMPLER_FOLDER = ".sampler"


def refresh_sampler(trainer: OnlineTrainer) -> None:
    """Save the policy (or its adapter) and have the server load it. All ranks call this.

    Nothing happens for a sampler that uses the model itself, or a server that is not to be refreshed.

    Raises:
        RecipeError: the server expects an adapter and none is trained, or a checkpoint and an adapter is.
        ServerError: the server does not load it; names its address.
    """
    server = _server(trainer)
    if server is None:
        return
    adapter = is_peft(trainer.model)
    if adapter != (server.how == "adapter"):
        trained = "an adapter" if adapter else "no adapter"
        raise RecipeError(f"sampler {server.name!r}: refresh is {server.how!r}, but {trained} is trained")
    folder = trainer.output_path / SAMPLER_FOLDER
    policy: Any = trainer.model

    def load() -> tuple[str | None, int] | None:
        if not trainer.is_world_process_zero():
            return None
        shutil.rmtree(folder, ignore_errors=True)
        with no_progress_bar():
            policy.save_pretrained(folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        server.refresh(folder)  # the server may read it again: it stays until the next one
        return server.adapter, server.version

    # Other ranks ask the same server, for the adapter under its new name.
    found = next(f for f in trainer.ranks.exchange(trainer.ranks.together(load)) if f is not None)
    server.adapter, server.version = found


def release_sampler(trainer: OnlineTrainer) -> None:
    """Remove what `refresh_sampler` left, here and on the server, once no more is sampled. All ranks call this."""
    server = _server(trainer)
    if server is None:
        return
    if trainer.is_world_process_zero():
        server.release()
        shutil.rmtree(trainer.output_path / SAMPLER_FOLDER, ignore_errors=True)
    server.adapter = None  # the next refresh names another


def _server(trainer: OnlineTrainer) -> Any:
    """The sampler that has to be given weights, also under one that branches; or None."""
    server: Any = getattr(trainer.sampler, "sampler", trainer.sampler)
    return None if getattr(server, "how", "none") == "none" else server
