"""The rows of a recipe's `data:`, split into training and held-out, and as data sets of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import PairDataset, Report, prepare_pairs, prepare_sft
from tokengrain.data.rows import Rows, load_rows, split_rows, with_columns
from tokengrain.errors import DataError, RecipeError, fingerprint
from tokengrain.method import make_objective
from tokengrain.recipe.schema import ResolvedStage
from tokengrain.specs import DataSpec, PromptSpec
from tokengrain.worlds import is_world, load_world


def open_rows(data: DataSpec, seed: int, *, prompts: bool = False) -> tuple[Rows, Rows | None]:
    """`(training rows, held-out rows or None)` of a source.

    Without `data.eval` a world gives fresh rows, and of any other source a part is held out.

    Args:
        prompts: of a world, take prompts instead of pairs.

    Raises:
        DataError: a source is missing, empty or damaged.
    """
    train = _source(data.train, data.split, data, "train", prompts)
    if data.limit is not None:
        train = _first(train, data.limit)
    if data.eval is not None:
        return train, _source(data.eval, data.eval_split, data, "eval", prompts)
    if data.eval_fraction == 0:
        return train, None
    if is_world(data.train):
        return train, _source(data.train, None, data, "eval", prompts)
    return split_rows(train, data.eval_fraction, seed)


def _source(source: str, split: str | None, data: DataSpec, part: str, prompts: bool = False) -> Rows:
    if is_world(source):
        if split is not None or data.columns:
            name, given = ("columns", data.columns) if split is None else ("split", split)
            raise RecipeError(f"data.{name} is {given!r}; expected none beside {source}, whose rows are its own")
        world: Any = load_world(source)
        if not prompts:
            return load_rows(world.pairs(part))
        if not callable(getattr(world, "prompts", None)):  # those of `stories` are plain texts
            raise RecipeError(f"world {world.name} has no prompts with checkable answers; use world://arithmetic")
        return load_rows(world.prompts(part))
    rows = load_rows(source, split=split, streaming=data.streaming)
    return with_columns(rows, data.columns) if data.columns else rows


def _first(rows: Any, limit: int) -> Rows:
    if not hasattr(rows, "subset"):
        raise RecipeError("data.limit does not go with data.streaming; use training.max_steps")
    return rows.subset(range(min(limit, len(rows))))


def data_fingerprint(data: DataSpec) -> str:
    """Identifies the content of the sources (not their names)."""
    sources = [(data.train, data.split, "train"), (data.eval, data.eval_split, "eval")]
    contents = [
        load_world(source).fingerprint if is_world(source) else _source(source, split, data, part).fingerprint
        for source, split, part in sources
        if source is not None
    ]
    return fingerprint(contents)


def tokenize_config(data: DataSpec) -> TokenizeConfig:
    return TokenizeConfig(**data.tokenize)


def prepare(stage: ResolvedStage, rows: Any, tokenizer: Any, positions: int | None) -> Any:
    """Rows as the data set that a stage trains on: pairs, or single completions.

    Raises:
        DataError: the first invalid row (unless `on_invalid: skip`), or nothing left.
    """
    if stage.online is not None:
        return _prompts(stage.online.prompts, stage.data, rows, tokenizer)
    make = prepare_pairs if wants_pairs(stage) else prepare_sft
    dataset = make(rows, tokenizer, tokenize_config(stage.data), model_positions=positions)
    return swapped(dataset) if stage.data.swap_pairs else dataset


def _prompts(spec: PromptSpec, data: DataSpec, rows: Rows, tokenizer: Any) -> Any:
    from tokengrain.rollout.sampler import encode_prompts
    from tokengrain.training.rollout import PromptDataset

    report = Report()
    items = encode_prompts(
        rows,
        tokenizer,
        tokenize_config(data),
        column=spec.column,
        template=spec.template,
        chat=spec.chat,
        report=report,
    )
    return PromptDataset(items, name=rows.name, report=report)


def wants_pairs(stage: ResolvedStage) -> bool:
    """Whether the stage needs both completions of a pair, or is to learn from both."""
    if stage.objective is None:
        return True
    return make_objective(**stage.objective).unit == "pairs" or stage.data.completions == "both"


def swapped(dataset: PairDataset) -> PairDataset:
    """The same pairs with chosen and rejected exchanged."""
    samples = (replace(s, completions=s.completions[::-1]) for s in dataset.samples)
    return PairDataset(samples, dataset.report, f"{dataset.name} (swapped)")


def annotated_files(run_dir: Path, stage: str) -> tuple[Path, Path]:
    """Files of an annotate stage: training rows, held-out rows (which may not exist)."""
    return run_dir / stage / "train.parquet", run_dir / stage / "eval.parquet"


def require_columns(dataset: Any, needed: Iterable[str], stage: ResolvedStage) -> None:
    """The data must bring the per-token columns that nothing else gives.

    Raises:
        DataError: naming the columns.
    """
    missing = sorted(set(needed) - set(getattr(dataset, "columns", needed)))
    if missing == ["spans"]:
        raise DataError(
            f"stage {stage.name!r} needs spans, and nothing marks them",
            file=stage.data.train,
            expected="data.spans: diff, tags, column or a function; or `credit:` to mark them by",
        )
    if missing:
        columns = ", ".join(f"{side}_{name}" for name in missing for side in ("chosen", "rejected"))
        raise DataError(
            f"stage {stage.name!r} needs {', '.join(missing)}, and nothing gives them",
            file=stage.data.train,
            expected=f"columns {columns} in the data, an annotate stage (data: '@stage'), or `credit:`",
        )
