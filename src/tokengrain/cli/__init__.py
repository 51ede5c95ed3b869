"""The command line: `tokengrain demo | train | annotate | evaluate | report | inspect | methods`."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokengrain.errors import RecipeError, RunError, TokengrainError

app = typer.Typer(
    name="tokengrain",
    help="Token-level alignment for language models.\n\n"
    "A method is a credit source (which tokens earned it) times an objective (how credit becomes a loss); a "
    "recipe is a YAML file that says which, on what model and what data.\n\n"
    "Start with:  tokengrain demo  and  tokengrain methods",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

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


def _version(wanted: bool) -> None:
    if wanted:
        from tokengrain import __version__

        typer.echo(f"tokengrain {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    pass


def _load(recipe: str, model: str | None, data: str | None, sets: list[str] | None, output: str | None) -> Any:
    from tokengrain.recipe import load_recipe

    overrides = list(sets or [])
    if output is not None:
        overrides.append(f"output_dir={json.dumps(output)}")
    return load_recipe(recipe, model, data, overrides)


@app.command()
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


@app.command()
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


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Pairs instead of the run's held-out ones.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples per prompt, in a world.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Evaluate a finished run: held-out pairs, and in a world the true reward, KL and frontier share.

    The numbers are written to evaluation.json in the run folder.

    Example:

        tokengrain evaluate runs/dpo
    """
    from tokengrain.training.judge_run import evaluate_run

    found = evaluate_run(run, data=data, samples=samples, console=Console(stderr=True))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    titles = {"held_out": "held-out pairs", "world": "world", "world_base": "world (base model)"}
    table = Table(box=None, pad_edge=False)
    for column in ("", "measure", "value"):
        table.add_column(column)
    for key, title in titles.items():
        for name, value in found.get(key, {}).items():
            table.add_row(title, name, f"{value:.4g}" if isinstance(value, float) else str(value))
            title = ""
    Console().print(table, highlight=False)


@app.command()
def report(
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file (default: in the run folder).")
    ] = None,
) -> None:
    """Write a report of a run: one HTML file that needs no network.

    Example:

        tokengrain report runs/tgdpo
    """
    from tokengrain.report import write_report

    typer.echo(write_report(run, output))


@app.command()
def inspect(
    source: Annotated[Path, typer.Argument(help="File with token rewards, or a run folder.")],
    row: Annotated[list[int] | None, typer.Option("--row", "-r", help="Row number, from 0; can be repeated.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many rows, if --row is not given.")] = 3,
    column: Annotated[str, typer.Option(help="Which numbers: token_rewards, ref_logps, ...")] = "token_rewards",
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer of a file outside a run folder.")] = None,
) -> None:
    """Show which tokens got credit, as coloured text.

    Examples:

        tokengrain inspect runs/tgdpo

        tokengrain inspect pairs.jsonl --tokenizer my/model --row 12
    """
    from tokengrain.report import inspect_rows

    if not source.exists():
        raise RunError(f"{source}: there is no such file or run folder")
    inspect_rows(source, rows=row, count=count, field=column, tokenizer=tokenizer)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False) -> None:
    """List the methods: paper, credit, objective, what is trained, recipe."""
    from dataclasses import asdict

    from tokengrain.methods import METHODS

    if as_json:
        typer.echo(json.dumps([asdict(method) for method in METHODS.values()], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("method", "credit", "objective", "trains", "paper", "recipe"):
        table.add_column(column, overflow="fold")
    for method in METHODS.values():
        table.add_row(method.name, method.credit, method.objective, method.trains, method.paper, method.recipe)
    Console().print(table, highlight=False)


@app.command()
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


def _quiet() -> None:
    """Leave the screen to what concerns the user; TOKENGRAIN_LOG=info shows what the libraries say."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Read when torch is loaded. Threads that spin while they wait cost minutes as soon as the cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = os.environ.get("TOKENGRAIN_LOG", "error").upper()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", level.lower())
    logging.basicConfig(level=getattr(logging, level, logging.ERROR), format="%(name)s: %(message)s")
    warnings.showwarning = _show_warning
    warnings.filterwarnings("once", module=r"tokengrain\b")
    if level == "ERROR":
        warnings.filterwarnings("ignore", module=r"(transformers|torch|peft|datasets|accelerate)\b")


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    """One line, without the place in the code that nobody here can change."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[yellow]warning:[/] {escape(str(message))}")


def _leave_processes() -> None:
    """Close the process group of a launcher: its threads must not outlive the interpreter."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Status 2: an error the user can act on; 130: stopped by the user."""
    _quiet()
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        # The status, where typer stopped by itself (after --help, after Ctrl-C); a command returns nothing.
        status = app(args=arguments, prog_name="tokengrain", standalone_mode=False) or 0
        if status == 0:
            _leave_processes()
    except TokengrainError as error:
        rank = os.environ.get("RANK", "0")
        where = f" (process {rank})" if rank != "0" else ""
        errors.print(f"[bold red]error:[/]{where} {escape(str(error))}")
        status = 2
    except (KeyboardInterrupt, typer.Abort):
        errors.print("stopped")
        status = 130
    except typer.Exit as stop:
        status = stop.exit_code
    except Exception as error:
        # What click itself found wrong: an unknown option, a missing argument.
        if not hasattr(error, "exit_code") or not hasattr(error, "show"):
            raise
        error.show()
        status = error.exit_code
    sys.exit(status)
