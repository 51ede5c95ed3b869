"""The command line: `tokengrain demo | train | annotate | evaluate | report | inspect | generate | merge | ...`."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Column, Table

from tokengrain.bench.cli import bench_app
from tokengrain.errors import RecipeError, RunError, TokengrainError, fault, json_text, require
from tokengrain.screen import Screen, labelled

RecipeArgument = Annotated[str, typer.Argument(help="Recipe file, or the name of one that comes with tokengrain.")]
RunArgument = Annotated[Path, typer.Argument(help="Run folder, as `tokengrain train` wrote it.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Model instead of the recipe's: folder, hub name, world://NAME.")
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", "-d", help="Training rows instead of the recipe's: file, hub name, world://NAME."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Any key of the recipe, dotted; can be given several times."),
]
GivenArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="The same without --set; also model, data, lr, epochs, batch."),
]
RateOption = Annotated[float | None, typer.Option("--lr", min=0, help="Learning rate of all stages.")]
EpochsOption = Annotated[float | None, typer.Option("--epochs", min=0, help="How often all stages see their rows.")]
BatchOption = Annotated[
    int | None, typer.Option("--batch", min=1, help="Pairs per step and process; online: prompts per rollout.")
]
LoraOption = Annotated[int | None, typer.Option("--lora-r", min=1, help="Train LoRA adapters of this rank.")]
OutputOption = Annotated[str | None, typer.Option("--output", "-o", help="Run folder instead of the recipe's.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace results of other settings that are in the run folder.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-run-code", help="Run Python code that the run folder's recipe names. Read it first.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check the recipe, show the plan, and stop.")]


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the demo.")] = Path("runs/demo"),
    samples: Annotated[int, typer.Option(min=1, max=10**6, help="Stories per prompt for the evaluation.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train again what is there already.")] = False,
) -> None:
    """Train five methods on a small world whose optimum is known, and show which tokens got credit.

    Needs no network and a few minutes. Ends with a table and a report (HTML); finished methods are reused.

    Example:

        tokengrain demo
    """
    from tokengrain.demo import run_demo

    run_demo(output, samples=samples, overwrite=overwrite)


def _loaded(
    recipe: RecipeArgument,
    given: GivenArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    sets: SetOption = None,
    lr: RateOption = None,
    epochs: EpochsOption = None,
    batch: BatchOption = None,
    lora_r: LoraOption = None,
    output: OutputOption = None,
) -> Any:
    """The recipe with what the command line says; what stands there twice is an error."""
    from tokengrain.run.load import load_recipe

    places, short = {"model": model, "data": data}, {"lr": lr, "epochs": epochs, "batch": batch, "lora.r": lora_r}
    overrides = [f"{key}={value}" for key, value in short.items() if value is not None]
    for text in given or ():
        key, equals, value = text.partition("=")
        what = f"got {text!r} after the recipe; expected key=value, such as lr=1e-5 or training.seed=1"
        require(equals and key, typer.BadParameter, what)
        if key in places:
            require(places[key] is None, RecipeError, f"{key} is given twice: {places[key]!r} and {value!r}")
            places[key] = value
        else:
            overrides.append(text)
    return load_recipe(recipe, places["model"], places["data"], [*overrides, *(sets or ())], output)


def _of_a_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """`command(loaded, ...)` with the arguments and options that say which recipe, and what in it is otherwise."""
    which, (_, *own) = (signature(one, eval_str=True).parameters.values() for one in (_loaded, command))

    @wraps(command)
    def called(**given: Any) -> None:
        command(_loaded(**{one.name: given.pop(one.name) for one in which}), **given)

    called.__dict__["__signature__"] = Signature([*which, *own])  # which typer reads
    return called


@_of_a_recipe
def train(loaded: Any, overwrite: OverwriteOption = False, dry_run: DryRunOption = False) -> None:
    """Run a recipe: its stages in order, each run, resumed or reused.

    If it was stopped or killed, the same command resumes from the last checkpoint. Several processes: put
    `accelerate launch -m` in front.

    Examples:

        tokengrain train dpo

        tokengrain train recipes/tgdpo.yaml --model my/model --data pairs.jsonl

        tokengrain train dpo model=my/model data=pairs.jsonl lr=1e-5 lora.r=16 stages.train.objective.beta=0.3

        accelerate launch -m tokengrain train dpo
    """
    from tokengrain.run.runner import run_recipe

    run_recipe(loaded, overwrite=overwrite, dry_run=dry_run)


@_of_a_recipe
def annotate(loaded: Any, overwrite: OverwriteOption = False) -> None:
    """Store token rewards beside the rows: run a recipe's stages up to its last annotate stage.

    The result is a parquet file in the run folder with the columns chosen_token_rewards,
    rejected_token_rewards and *_ref_logps. `tokengrain train` with the same recipe continues from there.

    Example:

        tokengrain annotate treg --model my/model --data pairs.jsonl
    """
    from tokengrain.run.runner import run_recipe

    names = [name for name, stage in loaded.stages.items() if stage.kind == "annotate"]
    what = f"{loaded.method} has no stage of kind annotate, so there is nothing to annotate"
    require(names, RecipeError, what)
    result = run_recipe(loaded, until=names[-1], overwrite=overwrite)
    for file in sorted((result.path / names[-1]).glob("*.parquet")):
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
    trust_run_code: TrustOption = False,
) -> None:
    """Evaluate a finished run on its held-out rows; in a world, also by what the world knows.

    After online training with several samples there is pass@k. A world gives the true reward, KL and frontier share, or
    accuracy, pass@k and maj@k. The numbers are written to evaluation.json in the run folder.

    Examples:

        tokengrain evaluate runs/dpo

        tokengrain evaluate runs/grpo --data test.jsonl --samples 8
    """
    from tokengrain.run.runner import evaluate_run

    found = evaluate_run(run, data=data, samples=samples, console=Screen(stderr=True), trust_run_code=trust_run_code)
    if as_json:
        typer.echo(json_text(found), nl=False)
        return
    titles = {
        "held_out": f"{found['rows']} held-out rows" if "rows" in found else "held-out rows",
        "sampling": "their completions",
        "world": "world",
        "world_base": "world (base model)",
    }
    table = Table("", "measure", "value", box=None, pad_edge=False)
    for key, title in titles.items():
        for name, value in found.get(key, {}).items():
            shown = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(title, name, shown)
            title = ""
    Screen().print(table, highlight=False)


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
    from tokengrain.report.html import write_report

    typer.echo(write_report(run, output))


def inspect(
    source: Annotated[Path, typer.Argument(help="File with token rewards, or a run folder.")],
    row: Annotated[list[int] | None, typer.Option("--row", "-r", help="Row number, from 0; can be repeated.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many rows, if --row is not given.")] = 3,
    column: Annotated[
        str | None,
        typer.Option(
            help="Which numbers: token_rewards (default), ref_logps, spans, ...; "
            "of online training advantages (default), entropy, ratio, ..."
        ),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer of a file outside a run folder.")] = None,
    spans: Annotated[
        str | None, typer.Option("--spans", help="Show the spans, marked anew: diff, tags, column or a function.")
    ] = None,
    trust_run_code: TrustOption = False,
) -> None:
    """Show which tokens got credit, as coloured text.

    Examples:

        tokengrain inspect runs/tgdpo

        tokengrain inspect pairs.jsonl --tokenizer my/model --row 12

        tokengrain inspect pairs.jsonl --tokenizer my/model --spans diff

        tokengrain inspect runs/grpo --column ratio
    """
    from tokengrain.report.terminal import inspect_rows
    from tokengrain.settings import trust_run_code as trusting

    require(source.exists(), RunError, f"{source}: there is no such file or run folder")
    what = f"--spans shows the column spans; drop --column {column} or --spans"
    require(spans is None or column in (None, "spans"), typer.BadParameter, what)
    with trusting(trust_run_code):
        inspect_rows(source, rows=row, count=count, field=column, tokenizer=tokenizer, spans=spans)


def rank(
    file: Annotated[Path, typer.Argument(help="Rows with `prompt` and `completions`, or preference pairs.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Token-level reward model: folder or hub name.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON lines (default: the file's name with .ranked.jsonl).")
    ] = None,
    pooling: Annotated[
        Literal["mean", "last"],
        typer.Option(help="A completion's score: mean of its tokens, or last, for a last-token reward model."),
    ] = "mean",
    on_invalid: Annotated[
        Literal["error", "skip"], typer.Option(help="What to do about rows that cannot be used.")
    ] = "error",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")] = False,
) -> None:
    """Score every completion with a reward model and say which is best (best of n).

    Adds `scores` and `best` to each row. For preference pairs it also says how often chosen scores higher.

    Example:

        tokengrain rank answers.jsonl --model runs/qrm/reward/model
    """
    from tokengrain.data.config import TokenizeConfig
    from tokengrain.rank import rank as rank_rows

    found = rank_rows(
        str(file),
        model,
        output=output,
        pooling=pooling,
        tokenize=TokenizeConfig(on_invalid=on_invalid),
        overwrite=overwrite,
    )
    typer.echo(f"{found.output}: {found.rows} rows" + (f", {found.skipped} skipped" if found.skipped else ""))
    if found.accuracy is not None:
        share = found.accuracy
        interval = f"95 % CI {share.low:.3f} to {share.high:.3f}"
        typer.echo(f"chosen scores higher in {share.value:.3f} of {found.pairs} pairs ({interval})")
        for bucket in found.by_length:
            longer = f"chosen longer by {bucket.low:g} to {bucket.high:g} tokens"
            typer.echo(f"  {longer}: {bucket.accuracy.value:.3f} of {bucket.pairs}")


def generate(
    model: Annotated[str, typer.Argument(help="Folder, adapter, hub name, or the folder of a finished run.")],
    prompts: Annotated[str, typer.Argument(help="Rows with `prompt`, or the questions of a benchmark.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Answers: .json or .jsonl.")],
    format: Annotated[
        Literal["rows", "alpaca_eval", "arena_hard", "mt_bench"] | None,
        typer.Option("--format", help="Of rows and answers (default: by the columns of the first row)."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template (default: for benchmarks, if there is one)."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in a benchmark's answers.")] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=10**6, help="Answers per prompt.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Default: 0; for MT-Bench what its authors take per category.")
    ] = None,
    top_p: Annotated[float, typer.Option(help="Smallest set of tokens with this probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**24, help="Most tokens of an answer.")] = 1024,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer only the first rows.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights; auto: as saved.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")] = False,
) -> None:
    """Answer a file of prompts, also those of AlpacaEval, Arena-Hard and MT-Bench. Stopped, it resumes.

    Examples:

        tokengrain generate runs/tgdpo prompts.jsonl -o answers.jsonl --temperature 0.7 --samples 4

        tokengrain generate my/model alpaca_eval.json -o outputs.json && alpaca_eval --model_outputs outputs.json
    """
    from tokengrain.generate import generate as answer

    how: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    how |= {"format": format, "chat": chat, "system": system, "name": name, "samples": samples, "limit": limit}
    found = answer(model, prompts, output, **how, dtype=dtype, overwrite=overwrite)
    kept = f", {found.resumed} of them from the call before" if found.resumed else ""
    typer.echo(f"{found.output}: {found.rows} answers{kept}")


def merge(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter, or of a finished run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the whole model.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights; auto: as the base's.")
    ] = "auto",
) -> None:
    """Fold an adapter into its base and save the whole model, compared with the two before and after it is saved.

    Example:

        tokengrain merge runs/tgdpo -o models/tgdpo --dtype bfloat16
    """
    from tokengrain import models
    from tokengrain.runs import is_run, read_run

    path = str(read_run(adapter).model_path) if is_run(adapter) else adapter
    typer.echo(models.merge(path, output, dtype))


def env() -> None:
    """Show versions, devices and settings of the environment: what a report of an error needs. No secrets."""
    import platform

    import torch

    from tokengrain.run.folder import versions

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator is not None else 0
    cuda = [torch.cuda.get_device_name(i) for i in range(count)] if torch.cuda.is_available() else []
    found = {
        **versions(),
        "platform": f"{platform.platform()}, {os.cpu_count()} cores",
        "torch for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        "devices": ", ".join(cuda) or (f"{count} × {accelerator.type}" if accelerator is not None else "CPU"),
        "threads": torch.get_num_threads(),
    }
    names = ("HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TOKENGRAIN_CACHE")
    found |= {name: os.environ[name] for name in names if name in os.environ}
    for name, value in found.items():
        typer.echo(f"{name}: {value}")


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
    matrix: Annotated[bool, typer.Option("--matrix", help="Which credit goes with which objective.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --matrix: the page of the documentation.")] = False,
) -> None:
    """List the methods: objective, credit, what is trained, paper. `tokengrain train METHOD` runs a method's recipe.

    Any credit source goes with any objective that can use it: `--matrix` shows how.
    """
    from dataclasses import asdict

    from tokengrain.method import METHODS

    require(matrix or not markdown, typer.BadParameter, "--markdown goes with --matrix")
    what = "the matrix is a table or markdown, not JSON; drop --json or --matrix"
    require(not matrix or not as_json, typer.BadParameter, what)
    if matrix:
        _print_matrix(markdown)
        return
    if as_json:
        typer.echo(json_text([asdict(method) for method in METHODS.values()]), nl=False)
        return
    names = (Column(name, no_wrap=True) for name in ("method", "objective"))
    table = Table(*names, "credit", "trains", "paper", box=None, pad_edge=False)
    for method in METHODS.values():
        table.add_row(method.name, method.objective, method.credit, method.trains, method.paper)
    Screen().print(table, highlight=False)


_ROLE_LETTERS = {
    "reward": "R",
    "weight": "W",
    "selection": "S",
    "selection (above: 0)": "S0",
    "span": "P",
    "span (above: 0)": "P0",
    "importance": "I",
    "–": "–",
}


def _print_matrix(markdown: bool) -> None:
    from tokengrain import tables
    from tokengrain.method import CREDIT

    if markdown:
        typer.echo(tables.matrix_page(), nl=False)
        return
    taking = {name: o for name, o in tables.objectives().items() if o.accepts}
    columns = (Column(name, no_wrap=True) for name in ("credit", *taking))
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in CREDIT:
        cells = (tables.cell(name, objective) for objective in taking)
        table.add_row(name, *(" ".join(_ROLE_LETTERS[word] for word in cell.split(", ")) for cell in cells))
    console = Screen()
    console.print(table, highlight=False)
    console.print(
        "R reward, I importance, W weight, S selection, P span (`as:` in a recipe); S0, P0: with `above: 0` only"
    )
    for name, objective in tables.objectives().items():
        if not objective.accepts:
            console.print(f"{name} takes no credit: {objective.takes_no_credit}", highlight=False)


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


for _command in (demo, train, annotate, evaluate, report, inspect, generate, merge, rank, methods, env):
    app.command()(_command)
app.add_typer(bench_app, name="bench")


def _quiet() -> None:
    """Leave the screen to what concerns the user; TOKENGRAIN_LOG=info shows what the libraries say."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Read when torch is loaded. Threads that spin while they wait cost minutes as soon as the cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = os.environ.get("TOKENGRAIN_LOG", "error").upper()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", level.lower())
    os.environ.setdefault("HF_HUB_VERBOSITY", level.lower())
    logging.basicConfig(level=getattr(logging, level, logging.ERROR), format="%(name)s: %(message)s")
    _shown.clear()
    warnings.showwarning = _show_warning
    warnings.filterwarnings("once", module=r"tokengrain\b")
    if level == "ERROR":
        warnings.filterwarnings("ignore", module=r"(transformers|torch|peft|datasets|accelerate)\b")


_shown: set[str] = set()  # Python itself forgets what it has shown "once" whenever a library changes the filters


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    """One line, once a command, without the place in the code that nobody here can change."""
    if str(message) in _shown:
        return
    _shown.add(str(message))
    Screen(stderr=True, highlight=False, soft_wrap=True).print(labelled("warning", str(message)))


def _leave_processes() -> None:
    """Close the process group of a launcher: its threads must not outlive the interpreter."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


_OF_TRL = {
    "model_name_or_path": "--model",
    "dataset_name": "--data",
    "learning_rate": "--lr",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch",
    "output_dir": "--output",
    "use_peft": "--lora-r 16",
    "lora_r": "--lora-r",
    "lora_alpha": "lora.alpha=VALUE",
    "lora_dropout": "lora.dropout=VALUE",
    "lora_target_modules": "lora.target_modules='[q_proj, v_proj]'",
    "loss_type": "stages.train.objective.loss_type=VALUE",
    "max_length": "data.max_length=VALUE",
    "dataset_train_split": "data.split=VALUE",
    "dataset_test_split": "data.eval_split=VALUE",
    "torch_dtype": "model.dtype=VALUE",
    "dtype": "model.dtype=VALUE",
    "attn_implementation": "model.attn_implementation=VALUE",
    "warmup_ratio": "training.warmup_steps=0.1 (below 1 it is a share)",
    "num_generations": "stages.train.training.num_generations=VALUE",
}
"""Options of TRL's command line, and what they are here."""


def _hint(error: Any) -> str | None:
    """Where what was typed is to be found, if it is a recipe's name or another library's option."""
    if type(error).__name__ == "NoSuchOption":
        from tokengrain.recipe.check import FOREIGN, field_types
        from tokengrain.training.config import PreferenceConfig

        name = str(error.option_name).lstrip("-").replace("-", "_")
        here = _OF_TRL.get(name) or (f"training.{name}=VALUE" if name in field_types(PreferenceConfig) else None)
        if here is None and (of_recipe := FOREIGN.get(name, "")).startswith(("objective.", "training.", "data.")):
            here = f"{'' if of_recipe.startswith('data') else 'stages.train.'}{of_recipe}=VALUE"
        return f"the {name} of other libraries is here: {here}" if here else None
    found = re.search(r"No such command ['\"]([\w-]+)['\"]", error.format_message())
    if found:
        from tokengrain.recipe.reading import recipe_folders

        if any((folder / f"{found[1]}.yaml").is_file() for folder in recipe_folders()):
            return f"{found[1]} is a recipe: tokengrain train {found[1]}"
    return None


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Status 2: an error the user can act on; 130: stopped by the user; 1: any other error."""
    _quiet()
    errors = Screen(stderr=True, highlight=False, soft_wrap=True)
    try:
        # The status, where typer stopped by itself (after --help, after Ctrl-C); a command returns nothing.
        status = app(args=arguments, prog_name="tokengrain", standalone_mode=False) or 0
        if status == 0:
            _leave_processes()
    except TokengrainError as error:
        rank = os.environ.get("RANK", "0")
        where = f"(process {rank}) " if rank != "0" else ""
        errors.print(labelled("error", f"{where}{error}", "bold red"))
        status = 2
    except (KeyboardInterrupt, typer.Abort) as stopped:
        if isinstance(stopped.__cause__, EOFError):  # which click takes for Ctrl-D
            raise stopped.__cause__ from None
        errors.print("stopped")
        status = 130
    except typer.Exit as stop:
        status = stop.exit_code
    except Exception as error:
        if (reason := fault(error)) is not None:  # for the user to mend: a file, a disk, memory
            errors.print(labelled("error", reason, "bold red"))
            status = 2
        elif hasattr(error, "exit_code") and hasattr(error, "show"):  # of click: an unknown option, say
            error.show()
            if hint := _hint(error):
                errors.print(labelled("hint", hint, "bold"))
            status = error.exit_code
        else:
            raise
    sys.exit(status)
