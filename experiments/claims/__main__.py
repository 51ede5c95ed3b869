"""`python -m experiments.claims`: which of the papers' claims hold here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from experiments.claims.report import claims_command
from tokengrain.errors import TokengrainError


def claims(
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Only the claims about this method (rrpo, sepo, ...); can be repeated."),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option("--group", "-g", help="Only this experiment (rrpo, stories-noisy, ...); can be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...: data, models and training of their own.")] = 5,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes, one thread each.")] = 1,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the log and the results.")] = Path(
        "runs/bench/claims"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes, to see that it works; says nothing about the methods.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Do the papers' claims hold here? Each method against its baseline, paired by seed, with a verdict.

    Small made-up tasks with a known truth take about a minute per seed, the world `stories` some ten minutes per seed
    and regime, on one core. Finished runs are kept, and the same command goes on from there.

    Writes claims.md and claims.json.

    Examples:

        python -m experiments.claims --jobs 2

        python -m experiments.claims --method rrpo --method sepo --group rrpo --group sepo
    """
    claims_command(method or None, group or None, seeds, jobs, output, quick=quick, as_json=as_json)


def main() -> None:
    """Run the command; an error of ours is one line on standard error and status 2."""
    try:
        typer.run(claims)
    except TokengrainError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
