"""Training from Python in one call."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from tokengrain.data.formats import stored_row
from tokengrain.data.pictures import as_json
from tokengrain.errors import DataError, ModelError, RecipeError, fingerprint, require, write_text
from tokengrain.models import load_reader
from tokengrain.recipe.reading import Values, find_recipe, read_file, resolve
from tokengrain.recipe.schema import Recipe
from tokengrain.run.load import make_recipe
from tokengrain.run.runner import RunResult, run_recipe
from tokengrain.runs import INPUTS
from tokengrain.screen import Screen
from tokengrain.specs import ModelSpec
from tokengrain.training.checkpoint import no_progress_bar

TRL_NAMES = {
    "train_dataset": "data",
    "eval_dataset": "eval_data",
    "processing_class": "tokenizer",
    "ref_model": "stages__train__reference='folder or hub name'; the default is the starting model",
    "args": "training__learning_rate=..., training__num_train_epochs=...: keys of the recipe",
    "peft_config": "lora={'r': 16, 'alpha': 32}",
    "loss_type": "stages__train__objective={'name': 'dpo', 'loss_type': ...}, or another objective",
    "reward_funcs": "stages__train__rewards=[...]",
    "beta": "stages__train__objective__beta=...",
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch",
    "max_length": "data__max_length=...",
}
"""What TRL's trainers call what is said otherwise here."""


@no_progress_bar()  # one for each model or data set that is loaded or saved
def train(
    recipe: str | Path | Recipe,
    *,
    model: Any = None,
    data: Any = None,
    eval_data: Any = None,
    tokenizer: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> RunResult:
    """Run a recipe: what `tokengrain train` does.

        result = tokengrain.train("recipes/dpo.yaml", model="my/model", data="pairs.jsonl", seed=1,
                                  training__learning_rate=1e-6)
        result.metrics["final"]["accuracy"], result.model_path

    Args:
        recipe: a file, the name of a recipe that comes with tokengrain ("dpo"), or a loaded recipe (which
            then takes no model, data or overrides).
        model: instead of the recipe's model: a name, or a model or adapter in memory. One in memory stays as it is: it
            is saved to `inputs/` in the run folder, so that the run can be resumed, and trained from there.
        data: instead of the recipe's training rows: a name, a list of rows or a `datasets.Dataset` (saved likewise).
        eval_data: held-out rows, likewise; without it a part of the rows is held out.
        tokenizer: of a model in memory, or its processor; None: the one at the place where the model was loaded from.
        output: the run folder, instead of the recipe's.
        overwrite: replace results of other settings in the run folder.
        quiet: show nothing.
        overrides: any key of the recipe; two underscores stand for the dot
            (`stages__train__objective__beta=0.3`).

    Returns:
        What came out: `path` of the run folder, `model_path`, `metrics` (its `metrics.json`), and in `reused` the names
        of stages that were finished before.

    Raises:
        RecipeError, DataError, ModelError, RunError: see `run_recipe`.
    """
    for name in (name for name in TRL_NAMES if name in overrides):
        raise RecipeError(f"train takes no {name}; the {name} of TRL's trainers is here: {TRL_NAMES[name]}")
    if isinstance(recipe, Recipe):
        given = any(part is not None for part in (model, data, eval_data, tokenizer, output)) or overrides
        require(not given, RecipeError, "a loaded recipe takes no overrides; give them to load_recipe")
    else:
        path = find_recipe(recipe)
        values, parsed = read_file(path), [(name.split("__"), value) for name, value in overrides.items()]
        parsed += [] if output is None else [(["output_dir"], str(output))]
        inputs = Path(_output_dir(values, parsed)) / INPUTS
        with PartialState().main_process_first():
            model, data, eval_data = _model(model, tokenizer, inputs), _rows(data, inputs), _rows(eval_data, inputs)
        if eval_data is not None:
            parsed.append((["data", "eval"], eval_data))
        given = {".".join(keys): f"argument {'__'.join(keys)}" for keys, _ in parsed}
        recipe = make_recipe(resolve(values, model, data, parsed), source=str(path), given=given)
    return run_recipe(recipe, overwrite=overwrite, console=Screen(quiet=quiet))


def _output_dir(values: Values, overrides: Sequence[tuple[list[str], Any]]) -> str:
    return str({"output_dir": "runs", **values, **{keys[0]: value for keys, value in overrides}}["output_dir"])


def _rows(rows: Any, inputs: Path) -> Any:
    """A name as it is; rows in memory as the name of a file that holds them, called by their content."""
    if rows is None or isinstance(rows, str):
        return rows
    if isinstance(rows, PathLike):
        return str(rows)
    what, expected = "these are no rows", "a name, a list of rows (mappings), or a datasets.Dataset"
    if type(rows).__module__.split(".")[0] == "datasets":
        known = hasattr(rows, "_fingerprint") and not isinstance(rows, Mapping)
        require(
            known,
            DataError,
            what,
            value=type(rows).__name__,
            expected=f"{expected}; of several splits one, of a stream its rows",
        )
        target = inputs / f"rows-{fingerprint([rows._fingerprint])}.parquet"
        if not target.exists():
            inputs.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(part := target.with_suffix(".part"))
            part.rename(target)
        return str(target)
    if isinstance(rows, Sequence) and rows and all(isinstance(name, str) for name in rows):
        return list(rows)
    require(isinstance(rows, Sequence), DataError, what, value=type(rows).__name__, expected=expected)
    lines = [_line(number, row) for number, row in enumerate(rows)]
    text = "".join(f"{line}\n" for line in lines)
    target = inputs / f"rows-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    if not target.exists():
        write_text(target, text)
    return str(target)


def _line(number: int, row: Any) -> str:
    where: Any = {"file": "list of rows", "row": number, "expected": "a mapping of names to text, numbers and lists"}
    require(isinstance(row, Mapping), DataError, "a row is not a mapping", value=type(row).__name__, **where)
    try:
        return json.dumps(stored_row(row, Path.cwd()), ensure_ascii=False, default=as_json)
    except (TypeError, ValueError) as error:
        raise DataError(f"a row cannot be written as JSON: {error}", **where) from error


def _model(model: Any, tokenizer: Any, inputs: Path) -> str | None:
    """A name as it is; a model in memory as the folder that it is saved to, called by its content."""
    if model is None or isinstance(model, (str, PathLike)):
        what = "tokenizer goes with a model in memory; a model at a path has its own"
        require(tokenizer is None, RecipeError, what)
        return None if model is None else str(model)
    kind = type(model).__name__
    require(hasattr(model, "save_pretrained"), ModelError, f"got {kind} as model; expected a name or a model")
    if tokenizer is None:
        place = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
        what = f"the {kind} does not say where its tokenizer is; give tokenizer="
        require(place, ModelError, what)
        tokenizer = load_reader(ModelSpec(path=place), place)
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    target = inputs / f"model-{digest.hexdigest()[:16]}"
    if not target.exists():
        inputs.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".saving-", dir=inputs))
        try:
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            staged.chmod(0o755)
            staged.rename(target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return str(target)
