"""The annotate stage, and the check that stored token credit belongs to what is trained with it."""

from __future__ import annotations

from typing import Any

import torch

from tokengrain.credit.annotate import annotate, load_annotated
from tokengrain.credit.manifest import check_manifest, is_annotated
from tokengrain.data import tokenizer_fingerprint
from tokengrain.errors import RecipeError
from tokengrain.files import fingerprint
from tokengrain.recipe import ModelSpec, ResolvedStage, resolve_stages
from tokengrain.scoring.reference import FrozenReference
from tokengrain.training import inputs, samples
from tokengrain.training.plan import StagePlan
from tokengrain.training.sources import build_credit
from tokengrain.training.workshop import Workshop


def run_annotation(shop: Workshop, plan: StagePlan) -> dict[str, Any]:
    """Write the rows with their token credit; finished shards of an earlier attempt are kept."""
    stage = plan.stage
    tokenizer = shop.tokenizer(stage.model)
    reference = FrozenReference(shop.frozen(stage.model)) if stage.options["reference_logps"] else None
    source = build_credit(stage, tokenizer, shop)
    counts = {}
    files = inputs.annotated_files(shop.run_dir, stage.name)
    all_rows = inputs.open_rows(stage.data, shop.recipe.seed)
    # As the policy will be scored: a reference in another precision is not equal to it at the start.
    precision = torch.autocast(shop.state.device.type, torch.bfloat16, enabled=stage.options["bf16"])
    for dataset, rows, output in zip(shop.datasets(stage), all_rows, files, strict=True):
        if dataset is None:
            continue
        with precision:
            annotate(
                dataset,
                tokenizer,
                inputs.tokenize_config(stage.data),
                {"token_rewards": source},
                reference,
                output,
                {**_marks(shop, stage, plan, stage.model), "source": fingerprint(plan.settings["credit"])},
                shard_rows=stage.options["shard_rows"],
                max_tokens=stage.options["max_tokens"],
                device=shop.state.device,
                rows=rows,
                progress=shop.state.is_main_process and not shop.console.quiet,
            )
        counts[output.stem] = len(dataset)
    if shop.state.is_main_process:
        samples.of_credit(shop, plan, files)
    return {"rows": counts}


def _marks(shop: Workshop, annotating: ResolvedStage, plan: StagePlan, like: ModelSpec) -> dict[str, str]:
    """What an annotated file depends on beside its credit source, by the names its manifest uses.

    Args:
        annotating: the stage whose data are annotated.
        plan: the stage that annotates or trains; its model is what the numbers must belong to.
        like: a model with that stage's tokenizer.
    """
    tokenizer = shop.tokenizer(like)
    tokenize = inputs.tokenize_config(plan.stage.data)
    return {
        "model": plan.settings["model"]["content"],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": fingerprint([tokenize.chat_template or tokenizer.chat_template]),
        "tokenize": fingerprint(plan.stage.data.tokenize),
        "data": inputs.data_fingerprint(annotating.data),
    }


def _without_unused_model(stage: ResolvedStage, marks: dict[str, str]) -> dict[str, str]:
    """Where the stored ref_logps are not used, the model they were made with does not matter."""
    if stage.reference in (None, "columns"):
        return marks
    return {name: mark for name, mark in marks.items() if name != "model"}


def annotated(shop: Workshop, plan: StagePlan) -> tuple[Any, Any]:
    """The data sets that an annotate stage made, checked to belong to this stage.

    Raises:
        RunError: made with another model, tokenizer, template, data or settings; says which.
    """
    stage = plan.stage
    maker = next(s for s in resolve_stages(shop.recipe) if s.name == stage.data.stage)
    marks = _without_unused_model(stage, _marks(shop, maker, plan, stage.model))
    tokenizer = shop.tokenizer(stage.model)
    files = inputs.annotated_files(shop.run_dir, str(stage.data.stage))
    train, held_out = (load_annotated(f, tokenizer, marks) if f.exists() else None for f in files)
    if train is None:
        raise RecipeError(f"stage {stage.data.stage!r} has written no {files[0].name}")
    return train, held_out


def check_given_files(shop: Workshop, plan: StagePlan, like: ModelSpec) -> None:
    """Annotated files that a recipe gives as ordinary data must belong to its model and tokenizer too.

    Args:
        like: a model that exists already and has the stage's tokenizer.

    Raises:
        RunError: made with another model, tokenizer or template, or changed since; says which.
    """
    data = plan.stage.data
    given = [source for source in (data.train, data.eval) if source is not None and is_annotated(source)]
    if plan.stage.kind not in ("train", "reward") or not given:
        return
    marks = _without_unused_model(plan.stage, _marks(shop, plan.stage, plan, like))
    del marks["data"]  # the rows are in the file itself, with a digest
    for source in given:
        check_manifest(source, marks)
