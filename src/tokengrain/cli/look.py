"""Commands that look at what is there: `report`, `inspect`, `rank`, `methods`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from tokengrain.cli.run import RunArgument
from tokengrain.errors import RunError


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
) -> None:
    """Show which tokens got credit, as coloured text.

    Examples:

        tokengrain inspect runs/tgdpo

        tokengrain inspect pairs.jsonl --tokenizer my/model --row 12

        tokengrain inspect pairs.jsonl --tokenizer my/model --spans diff

        tokengrain inspect runs/grpo --column ratio
    """
    from tokengrain.report import inspect_rows

    if not source.exists():
        raise RunError(f"{source}: there is no such file or run folder")
    if spans is not None and column not in (None, "spans"):
        raise typer.BadParameter(f"--spans shows the column spans; drop --column {column} or --spans")
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
    from tokengrain.data import TokenizeConfig
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


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
    matrix: Annotated[bool, typer.Option("--matrix", help="Which credit goes with which objective.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --matrix: the page of the documentation.")] = False,
) -> None:
    """List the methods: paper, credit, objective, what is trained, recipe.

    Any credit source goes with any objective that can use it: `--matrix` shows how.
    """
    from dataclasses import asdict

    from tokengrain.methods import METHODS

    if markdown and not matrix:
        raise typer.BadParameter("--markdown goes with --matrix")
    if matrix and as_json:
        raise typer.BadParameter("the matrix is a table or markdown, not JSON; drop --json or --matrix")
    if matrix:
        _print_matrix(markdown)
        return
    if as_json:
        typer.echo(json.dumps([asdict(method) for method in METHODS.values()], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("method", "credit", "objective", "trains", "paper", "recipe"):
        table.add_column(column, overflow="fold")
    for method in METHODS.values():
        table.add_row(method.name, method.credit, method.objective, method.trains, method.paper, method.recipe)
    Console().print(table, highlight=False)


_ROLE_LETTERS = {
    "reward": "R",
    "weight": "W",
    "selection": "S",
    "selection (above: 0)": "S0",
    "span": "P",
    "span (above: 0)": "P0",
    "–": "–",
}


def _print_matrix(markdown: bool) -> None:
    from tokengrain import matrix
    from tokengrain.credit import CREDIT

    if markdown:
        typer.echo(matrix.markdown(), nl=False)
        return
    taking = {name: o for name, o in matrix.objectives().items() if o.accepts}
    table = Table(box=None, pad_edge=False)
    for column in ("credit", *taking):
        table.add_column(column, no_wrap=True)
    for name in CREDIT:
        cells = (matrix.cell(name, objective) for objective in taking)
        table.add_row(name, *(" ".join(_ROLE_LETTERS[word] for word in cell.split(", ")) for cell in cells))
    console = Console()
    console.print(table, highlight=False)
    console.print("R reward, W weight, S selection, P span (`as:` in a recipe); S0, P0: with `above: 0` only")
    for name, objective in matrix.objectives().items():
        if not objective.accepts:
            console.print(f"{name} takes no credit: {objective.no_credit}", highlight=False)
