"""`tokengrain bench`: how right a credit is, and which of the methods' claims hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from tokengrain.errors import RecipeError, json_text
from tokengrain.screen import Screen

bench_app = typer.Typer(
    name="bench",
    help="Measure what the methods rest on.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
Several = list[str] | None
FUNCTION = "path.py:function or module:function"
OF_WORLDS = ("world", "regime", "seeds", "steps", "prompts", "generations", "jobs")
OF_TEXTS = ("model", "how", "tokens", "rows", "seed")
"""Options of `credit` that act only without `--data`, or only with it."""


def _refuse(context: typer.Context, options: Sequence[str], why: str) -> None:
    """An error for options that were given and would do nothing."""
    given = [f"--{o}" for o in options if (how := context.get_parameter_source(o)) and how.name != "DEFAULT"]
    if given:
        raise RecipeError(f"{', '.join(given)}: {why}")


@bench_app.command()
def credit(
    context: typer.Context,
    world: Annotated[str, Option("--world", "-w", help="World whose exact credit is known.")] = "world://stories",
    seeds: Annotated[int, Option(min=1, help="Seeds 0, 1, ...: pairs, trainings and samples of their own.")] = 5,
    regime: Annotated[Several, Option(help="Value of the world's option regime, noisy or clean; repeatable.")] = None,
    source: Annotated[Several, Option("--source", "-s", help="Credit source; repeatable (in a world: all).")] = None,
    own: Annotated[Several, Option("--credit", "-c", metavar="FUNCTION", help=f"Your own: {FUNCTION}.")] = None,
    model: Annotated[str | None, Option("--model", "-m", help="With --data: folder, hub name, world://NAME.")] = None,
    data: Annotated[str | None, Option("--data", "-d", help="Rows with good answers: do the corruption test.")] = None,
    how: Annotated[Several, Option(help="Corruption: random, unlikely, swap; repeatable.")] = None,
    tokens: Annotated[int, Option(min=1, help="Corrupted places per answer.")] = 2,
    rows: Annotated[int, Option(min=1, help="Most answers to corrupt.")] = 200,
    seed: Annotated[int, Option(min=0, help="Of the corruption.")] = 0,
    steps: Annotated[int | None, Option(min=1, help="Of each training, of 32 pairs (120; chains: 60).")] = None,
    prompts: Annotated[int | None, Option(min=2, help="Prompts to judge per seed (default: the world's).")] = None,
    generations: Annotated[int, Option("--generations", "-g", min=2, help="Completions per prompt (chains).")] = 8,
    jobs: Annotated[int, Option("--jobs", "-j", min=1, max=256, help="Processes, one thread each, in a world.")] = 1,
    output: Annotated[Path | None, Option("--output", "-o", help="Folder (default: in runs/bench).")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
    trust_run_code: Annotated[bool, Option("--trust-run-code", help="Run the code that a run's recipe names.")] = False,
) -> None:
    """Is the credit right? Compare credit sources with the truth, or see whether they find corrupted tokens.

    In a world: credit against the truth, over seeds of one or two minutes each; the same command resumes what was
    stopped. In stories the truth is the exact soft advantage of every token; in arithmetic and revision it is the first
    wrong token of sampled chains, also for credit of the online methods (outcome, thr, rto, gae, ...), and in revision
    which tokens of a reference answer depend on the reasoning (r3).

    On your own text (--data): a few tokens of good answers are corrupted; does credit fall there? A source is a
    name, a recipe's credit as YAML, or a run folder.

    Writes credit.json, credit.md and credit.html.

    Examples:

        tokengrain bench credit --source guide --source contrastive --regime noisy --regime clean

        tokengrain bench credit --world world://arithmetic --jobs 2

        tokengrain bench credit --credit my_credit.py:reward

        tokengrain bench credit --data pairs.jsonl --source runs/tgdpo

        tokengrain bench credit --model my/model --data pairs.jsonl --source contrastive --how random --how swap
    """
    from tokengrain.bench.page import PAGE, terminal_tables

    shared: dict[str, Any] = {"credit": own or (), "console": Screen(stderr=True, quiet=as_json)}
    if data is not None:
        from tokengrain.bench.corruption import bench_corruption
        from tokengrain.settings import trust_run_code as trusting

        _refuse(context, OF_WORLDS, "of no use with --data, which asks for the corruption test")
        folder = output or Path("runs/bench/corruption")
        given: dict[str, Any] = {"how": how or ("random",), "tokens": tokens, "rows": rows, "seed": seed}
        with trusting(trust_run_code):
            result = bench_corruption(model, data, sources=source or (), output=folder, **given, **shared)
    else:
        from tokengrain.bench.credit import bench_credit

        _refuse(context, OF_TEXTS, "of the corruption test, which needs --data")
        folder = output or Path("runs/bench/credit")
        given = {"seeds": seeds, "regimes": regime or (), "jobs": jobs, "steps": steps, "prompts": prompts}
        result = bench_credit(world, sources=source or None, generations=generations, output=folder, **given, **shared)
    if as_json:
        typer.echo(json_text(result), nl=False)
        return
    console = Screen()
    for table in terminal_tables(result):
        console.print(table)
    console.print(
        f"Report:  {folder / PAGE}\nNumbers: {folder / 'credit.json'}", soft_wrap=True, highlight=False, markup=False
    )


@bench_app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def claims() -> None:
    """The papers' claims: not part of the package; see `make claims` in the project's repository."""
    where = "in a checkout of the project run `make claims`, or `python -m experiments.claims --help`"
    raise RecipeError(f"the experiments on the papers' claims are not part of the installed package; {where}")
