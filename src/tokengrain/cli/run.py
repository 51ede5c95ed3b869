"""Commands that train: `demo`, `train`, `annotate`, `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tokengrain.errors import RecipeError

RecipeArgument = Annotated[str, typer.Argument(help="Recipe file, or the name of one that comes with tokengrain.")]
RunArgument = Annotated[Path, typer.Argument(help="Run folder, as `tokengrain train` wrote it.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Model instead of the recipe's: folder, hub name, world://NAME."),
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", "-d", help="Training rows instead of the recipe's: file, hub name, world://NAME."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Any key of the recipe, dotted; can be given several times."),
]
OutputOption = Annotated[str | None, typer.Option("--output", "-o", help="Run folder instead of the recipe's.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace results of other settings that are in the run folder.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check the recipe, show the plan, and stop.")]


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the demo.")] = Path("runs/demo"),
    samples: Annotated[int, typer.Option(min=1, help="Stories per prompt for the evaluation.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train again what is there already.")] = False,
) -> None:
    """Train five methods on a small world whose optimum is known, and show which tokens got credit.

    Needs no network and a few minutes. Ends with a table and a report (HTML); finished methods are reused.

    Example:

        tokengrain demo
    """
    from tokengrain.demo import run_demo

    run_demo(output, samples=samples, overwrite=overwrite)


def train(
    recipe: RecipeArgument,
    model: ModelOption = None,
    data: DataOption = None,
    sets: SetOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Run a recipe: its stages in order, each run, resumed or reused.

    Stopped or killed, the same command goes on from the last checkpoint. Several processes: put
    `accelerate launch -m` in front.

    Examples:

        tokengrain train dpo

        tokengrain train recipes/tgdpo.yaml --model my/model --data pairs.jsonl

        tokengrain train dpo --set training.learning_rate=1e-6 --set stages.train.objective.beta=0.3

        accelerate launch -m tokengrain train dpo
    """
    from tokengrain.training.stages import run_recipe

    run_recipe(_load(recipe, model, data, sets, output), overwrite=overwrite, dry_run=dry_run)


def annotate(
    recipe: RecipeArgument,
    model: ModelOption = None,
    data: DataOption = None,
    sets: SetOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Store token rewards beside the rows: run a recipe's stages up to its last annotate stage.

    The result is a parquet file in the run folder with the columns chosen_token_rewards,
    rejected_token_rewards and *_ref_logps. `tokengrain train` with the same recipe goes on from it.

    Example:

        tokengrain annotate treg --model my/model --data pairs.jsonl
    """
    from tokengrain.training.stages import run_recipe

    loaded = _load(recipe, model, data, sets, output)
    names = list(loaded.stages)
    last = [i for i, stage in enumerate(loaded.stages.values()) if stage.kind == "annotate"]
    if not last:
        raise RecipeError(f"{recipe} has no stage of kind annotate, so there is nothing to annotate")
    result = run_recipe(loaded, until=names[last[-1]], overwrite=overwrite)
    for file in sorted((result.path / names[last[-1]]).glob("*.parquet")):
        typer.echo(file)


def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Rows instead of the run's held-out ones.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples per prompt: in a world (default: 64 of stories, 16 of arithmetic and revision); elsewhere of "
            "held-out prompts after online training (default: the recipe's eval_generations; several are drawn at the "
            "training's temperature unless eval_temperature is set). Refused where nothing is sampled.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Evaluate a finished run: held-out rows (after online training with pass@k, if there are several samples), and
    in a world the true reward, KL and frontier share, or accuracy, pass@k and maj@k.

    The numbers are written to evaluation.json in the run folder.

    Examples:

        tokengrain evaluate runs/dpo

        tokengrain evaluate runs/grpo --data test.jsonl --samples 8
    """
    from tokengrain.training.judge_run import evaluate_run

    found = evaluate_run(run, data=data, samples=samples, console=Console(stderr=True))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    titles = {
        "held_out": "held-out rows",
        "sampling": "their completions",
        "world": "world",
        "world_base": "world (base model)",
    }
    table = Table(box=None, pad_edge=False)
    for column in ("", "measure", "value"):
        table.add_column(column)
    for key, title in titles.items():
        for name, value in found.get(key, {}).items():
            table.add_row(
                title, name, f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)
            )
            title = ""
    Console().print(table, highlight=False)


def _load(recipe: str, model: str | None, data: str | None, sets: list[str] | None, output: str | None) -> Any:
    from tokengrain.recipe import load_recipe

    return load_recipe(recipe, model, data, sets or [], output)
