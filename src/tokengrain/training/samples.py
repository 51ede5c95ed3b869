"""A few pairs with the credit of every token, stored in the run folder for `report` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.files import read_json, write_json

if TYPE_CHECKING:
    from tokengrain.training.plan import StagePlan
    from tokengrain.training.workshop import Workshop

COUNT = 8


def of_credit(shop: Workshop, plan: StagePlan, files: tuple[Path, Path]) -> None:
    """Store the token credit of the first annotated pairs, held-out ones if there are any."""
    from tokengrain.credit.annotate import load_annotated

    batch = _first(load_annotated(files[1] if files[1].exists() else files[0]))
    _store(shop, plan, batch, f"credit: {(plan.stage.credit or {}).get('name')}", batch.columns["token_rewards"])


def of_policy(shop: Workshop, plan: StagePlan, trainer: Any) -> None:
    """Store each token's log-ratio of the trained policy to its reference (nats). All processes take part."""
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if plan.stage.kind != "train" or trainer.reference is None or not hasattr(dataset, "__len__"):
        return
    batch = _first(dataset)
    model = trainer.evaluation_model().eval()
    with torch.no_grad():
        judged = trainer.judge(model, batch.to(trainer.args.device), measure=("log_ratio", "whole"))
    if shop.state.is_main_process and judged.log_ratio is not None:
        _store(shop, plan, batch, f"log-ratio of {plan.stage.name}", judged.log_ratio.float().cpu())


def _first(dataset: Any) -> TokenBatch:
    return TokenBatch.from_samples([dataset[i] for i in range(min(COUNT, len(dataset)))])


def _store(shop: Workshop, plan: StagePlan, batch: TokenBatch, source: str, values: Tensor) -> None:
    """Put the entries of one source into the run's file, in place of earlier ones of that source."""
    from tokengrain.report.samples import FILE, collect_credit_samples
    from tokengrain.worlds import is_world, load_world

    data = shop.recipe.data.train
    truth = load_world(data).advantages(batch) if is_world(data) else None
    tokenizer = shop.tokenizer(plan.stage.model)
    path = shop.run_dir / FILE
    kept = [entry for entry in (read_json(path) if path.exists() else []) if entry.get("source") != source]
    write_json(path, kept + collect_credit_samples(batch, tokenizer, {source: values}, truth=truth))
