"""The command line: `tokengrain demo | train | annotate | evaluate | report | inspect | rank | methods | bench`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tokengrain.bench.cli import bench_app
from tokengrain.cli import look, run
from tokengrain.errors import TokengrainError

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


_COMMANDS: tuple[Callable[..., None], ...] = (
    run.demo,
    run.train,
    run.annotate,
    run.evaluate,
    look.report,
    look.inspect,
    look.rank,
    look.methods,
)
for _command in _COMMANDS:
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
    """Run the command line. Status 2: an error the user can act on; 130: stopped by the user; 1: any other error."""
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
    except OSError as error:
        # A file that cannot be read or written is for the user to mend; one without a file's name is not known to be.
        if error.filename is None:
            raise
        errors.print(f"[bold red]error:[/] {escape(f'{error.filename2 or error.filename}: {error.strerror}')}")
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
