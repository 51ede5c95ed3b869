"""What must fit together before training starts: vocabularies, positions, columns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from tokengrain.batch import Sample
from tokengrain.errors import DataError, ModelError, RecipeError
from tokengrain.method import BoundObjective

HINTS = {
    "token_rewards": ", or a credit source",
    "spans": "; spans come from data.spans (diff, tags, column or a function), or from token credit",
    "selected": "; or token credit to select by",
}

PASSED_ON = ("callbacks", "optimizers", "optimizer_cls_and_kwargs")
"""Arguments of `transformers.Trainer` that have their meaning here; the others would be without effect."""


def check_arguments(args: Any, kind: type, given: Collection[str]) -> None:
    """Check what a trainer is made with.

    Args:
        args: its settings; kind: the class that they must have.
        given: names of further arguments for `transformers.Trainer`.

    Raises:
        RecipeError: settings of another class; an argument that would be ignored.
    """
    if not isinstance(args, kind):
        raise RecipeError(f"the trainer's settings are {type(args).__name__}; expected {kind.__name__}")
    if unknown := sorted(set(given) - set(PASSED_ON)):
        raise RecipeError(
            f"the trainer takes no {', '.join(unknown)}; expected its own arguments, or {', '.join(PASSED_ON)}, which "
            "go to transformers. Objective and credit make the loss; evaluation has its own metrics and no predictions"
        )


def by_name(train: Any, evaluation: Any) -> dict[str, Any]:
    """Data sets by a name for messages; of several evaluation sets one may be called "train"."""
    if not isinstance(evaluation, Mapping):
        return {"train": train, "eval": evaluation}
    return {"train": train, **{f"eval_{name}": dataset for name, dataset in evaluation.items()}}


def vocabulary_size(model: Any) -> int | None:
    """Rows of the model's output head; None if it cannot be told."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and getattr(head, "weight", None) is not None:
        return int(head.weight.shape[0])
    config = getattr(model, "config", None)
    return getattr(config.get_text_config(), "vocab_size", None) if config is not None else None


def model_positions(model: nn.Module) -> int | None:
    """Longest sequence the model was built for, in tokens; None if it has no such limit."""
    config = getattr(model, "config", None)
    return getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None


def check_vocabulary(model: nn.Module, other: Any, role: str) -> None:
    """Raise ModelError unless `other` (a model) has the policy's vocabulary.

    Args:
        role: what `other` is, for the message: "reference", "guide".
    """
    ours, theirs = vocabulary_size(model), vocabulary_size(other)
    if ours is not None and theirs is not None and ours != theirs:
        raise ModelError(f"the {role} has a vocabulary of {theirs} tokens, the policy of {ours}; they must be the same")


def check_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Raise ModelError if the tokenizer can give ids that the model does not have."""
    size = vocabulary_size(model)
    if tokenizer is None or size is None or not hasattr(tokenizer, "__len__"):
        return
    if len(tokenizer) > size:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the model a vocabulary of {size}")


def models_in(source: Any) -> list[nn.Module]:
    """Language models that a credit source or reference holds, directly or in one of its parts.

    Not those of a source that reads the text with a tokenizer of its own (`own_vocabulary`).
    """
    if getattr(source, "own_vocabulary", False):
        return []
    found = []
    for value in vars(source).values() if hasattr(source, "__dict__") else ():
        if isinstance(value, nn.Module):
            found += [value] if hasattr(value, "config") else []
        elif type(value).__module__.startswith("tokengrain."):
            found += models_in(value)
    return found


def check_datasets(
    datasets: Mapping[str, Any], model: nn.Module, objective: BoundObjective, columns: Collection[str]
) -> None:
    """Check the data sets whose rows are at hand, by name, before training; a stream is checked as it is read.

    Args:
        columns: per-token columns that every row must have.

    Raises:
        DataError: as `check_samples` and `check_column`.
    """
    for name, dataset in datasets.items():
        if not hasattr(dataset, "__len__"):
            continue
        where = getattr(dataset, "name", name)
        rows = (dataset[i] for i in range(len(dataset)))
        check_samples(rows, model, name=where, pairs=objective.unit == "pairs")
        for column in sorted(columns):
            check_column(dataset, column, objective.name, name=where)


def check_samples(samples: Iterable[Sample], model: nn.Module, *, name: object, pairs: bool) -> int:
    """Check rows against the model; returns their number.

    Raises:
        DataError: no rows; a row that is no `Sample`; one that is not a pair where pairs are needed; a sequence longer
            than the model's positions; a token id the model does not have.
    """
    limit, vocabulary = model_positions(model), vocabulary_size(model)
    count = 0
    for sample in samples:
        count += 1
        check_sample(sample, limit, vocabulary, name=name, pairs=pairs)
    if not count:
        raise DataError("the dataset is empty", file=name, expected="at least one row")
    return count


def check_sample(sample: Sample, limit: int | None, vocabulary: int | None, *, name: object, pairs: bool) -> None:
    """Check one row; see `check_samples`."""
    _check_type(sample, name)
    if pairs and len(sample.completions) != 2:
        raise DataError(
            "a preference pair has two completions",
            file=name,
            row=sample.row,
            value=len(sample.completions),
            expected="chosen and rejected",
        )
    fields = ("chosen", "rejected") if len(sample.completions) == 2 else ("completion",) * len(sample.completions)
    for field, completion in zip(fields, sample.completions, strict=True):
        length = len(sample.prompt_ids) + len(completion.ids)
        if limit is not None and length > limit:
            raise DataError(
                "prompt and completion are longer than the model's positions",
                file=name,
                row=sample.row,
                field=field,
                value=f"{length} tokens",
                expected=f"at most {limit}; set max_length",
            )
        largest = max([*completion.ids, *sample.prompt_ids], default=0)
        if vocabulary is not None and largest >= vocabulary:
            raise DataError(
                "a token id is outside the model's vocabulary",
                file=name,
                row=sample.row,
                field=field,
                value=largest,
                expected=f"less than {vocabulary}; is this the model's own tokenizer?",
            )


def _check_type(sample: Any, name: object) -> None:
    if not isinstance(sample, Sample):
        raise DataError(
            "a row is not tokenised",
            file=name,
            value=type(sample).__name__,
            expected="a Sample, which prepare_pairs and prepare_sft of tokengrain.data make of rows of text",
        )


def has_column(dataset: Any, column: str) -> bool:
    """Whether the rows of a map-style dataset carry this per-token column (its first row says).

    A stream is not asked: reading its first row would use it up.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        return False
    _check_type(dataset[0], getattr(dataset, "name", "train"))
    return column in dataset[0].completions[0].columns


def check_column(dataset: Any, column: str, objective: str, *, name: object) -> None:
    """Raise DataError unless the rows carry a per-token column that the objective needs."""
    if not has_column(dataset, column):
        raise DataError(
            f"objective {objective} needs per-token {column}, which the rows do not have",
            file=name,
            row=dataset[0].row,
            field=f"*_{column}",
            expected="values in every row" + HINTS.get(column, ""),
        )
