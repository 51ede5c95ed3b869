"""What a user sees of a run: its plan, its progress, each stage's outcome, the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from transformers import TrainerCallback

from tokengrain.report.html import maps_page, maps_table
from tokengrain.report.rows import read_credit_samples
from tokengrain.runs import TITLES, spoken
from tokengrain.screen import labelled, progress_bar

_ACTIONS = {"run": "run", "resume": "resume", "reuse": "reuse (done, same settings)"}


def print_plan(console: Console, title: str, stages: Iterable[tuple[str, str, str, str]]) -> None:
    """A line per stage: its name, its kind, what it does, and whether it runs, resumes or is reused."""
    columns = (Column(name, overflow="fold") for name in ("stage", "kind", "what", "plan"))
    table = Table(*columns, title=Text(title), title_justify="left", box=None, pad_edge=False)
    for *what, action in stages:
        table.add_row(*map(Text, what), _ACTIONS[action], style="dim" if action == "reuse" else "")
    console.print(table)


def print_outlooks(console: Console, outlooks: Mapping[str, Any]) -> None:
    """What each stage that trains will do: rows, batch, steps, rate; and what was chosen for it, with the reason."""
    for name, found in outlooks.items():
        console.print(f"{name}: {found}", highlight=False, markup=False, soft_wrap=True)
    for reasons in dict.fromkeys(found.reasons for found in outlooks.values()):
        if reasons:
            console.print(f"chosen here: {reasons}", highlight=False, markup=False, soft_wrap=True, style="dim")


def print_rows(console: Console, what: str, dataset: Any) -> None:
    """How many rows were skipped, cut or without a span, if any were."""
    report = getattr(dataset, "report", None)
    if report is not None and report.notable:
        console.print(f"{what}: {report}", highlight=False, markup=False)


def print_end(console: Console, trainer: Any) -> None:
    """Where training ended early, and which step's model is kept, where it is not the last one's."""
    state, said = trainer.state, list[str]()
    if state.global_step < state.max_steps:
        said.append(f"ended early, at step {state.global_step} of {state.max_steps}")
    if trainer.args.load_best_model_at_end and state.best_global_step:
        said.append(f"the model is that of step {state.best_global_step}, the best that was evaluated")
    if said:
        console.print(f"  {'; '.join(said)}", highlight=False, soft_wrap=True)


def print_stage(console: Console, seconds: float, metrics: dict[str, Any]) -> None:
    """What came out of a stage, in one line."""
    parts = [f"{seconds:.0f} s"]
    after = metrics.get("after", {})
    if "accuracy" in after:
        parts.append(f"held-out accuracy {spoken(after, 'accuracy')}")
    elif "reward" in after:
        parts.append(f"held-out reward {spoken(after, 'reward')}")
    elif "perplexity" in after:
        parts.append(f"held-out perplexity {after['perplexity']:.2f}")
    if "queries" in metrics:
        parts.append(", ".join(f"{name} {after[name]:.3f}" for name in after if not name.endswith(("_low", "_high"))))
    if "rows" in metrics:
        parts.append(", ".join(f"{count} rows in {name}.parquet" for name, count in metrics["rows"].items()))
    if "vocabulary" in metrics:
        parts.append(f"{metrics['vocabulary']} tokens")
    console.print(f"  done: {'; '.join(parts)}", highlight=False)


def print_result(console: Console, metrics: dict[str, Any], path: Path) -> None:
    """The held-out numbers of every trained stage, before and after, and where the run is."""
    title = Text(f"{metrics['method']} in {metrics['seconds']:.0f} s")
    table = Table(
        "stage", "held-out rows", "before", "after", title=title, title_justify="left", box=None, pad_edge=False
    )
    for name, stage in metrics["stages"].items():
        before, after = stage.get("before", {}), stage.get("after", {})
        shown = f"{name} ({stage['held_out']} rows)" if "held_out" in stage else name
        for key in (key for key in TITLES if key in after):
            start = spoken(before, key) if key in before else ""
            table.add_row(shown, TITLES[key], start, spoken(after, key, before))
            shown = ""
    if table.row_count:
        console.print(table, highlight=False)
    else:
        console.print("no held-out rows, so nothing was evaluated (data.eval or data.eval_fraction)")
    console.print(f"run folder: {path}", soft_wrap=True, highlight=False, markup=False)


# ---- Progress ----

SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "nll/token": "nll",
    "reward/mean": "reward",
    "reward/correct": "correct",
    "rollout/length": "length",
}


class Trackers(TrainerCallback):
    """The trackers' runs of one stage: heat maps as training ends, then the evaluation behind it, then they are closed.

    `store` puts the stage's own credit into `file`, which has the earlier stages' already. A run that is open before
    the stage is the user's, and stays open.
    """

    def __init__(self, trainer: Any, file: Path, store: Callable[[], None]) -> None:
        self.trainer, self.file, self.store = trainer, file, store
        self.close_own: list[Callable[[], Any]] = []
        for tracker in trainer.callback_handler.callbacks:
            known = vars(tracker)
            if (wandb := known.get("_wandb")) is not None and wandb.run is None:
                self.close_own.append(wandb.finish)
            if (mlflow := known.get("_ml_flow")) is not None and mlflow.active_run() is None:
                self.close_own.append(mlflow.end_run)
        trainer.callback_handler.callbacks.insert(0, self)  # before those that close their run as training ends

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.report_to:
            return
        self.store()
        for tracker in self.trainer.callback_handler.callbacks:
            if "_auto_end_run" in vars(tracker):
                tracker._auto_end_run = False  # MLflow's: the evaluation behind training belongs to the run
        if not state.is_world_process_zero or not (samples := read_credit_samples(self.file)):
            return
        page = maps_page(samples)
        for tracker in self.trainer.callback_handler.callbacks:
            known = vars(tracker)
            if known.get("tb_writer") is not None:
                tracker.tb_writer.add_text("token credit", maps_table(samples), state.global_step)
            for library in filter(None, (known.get("_wandb"), known.get("_trackio"))):
                library.log({"token credit": library.Html(page)})
            if known.get("_ml_flow") is not None and known["_ml_flow"].active_run():
                tracker._ml_flow.log_text(page, f"token-credit-{state.global_step}.html")

    def close(self) -> None:
        """Close what the stage opened: W&B would put the next stage into the same run."""
        for close in self.close_own:
            close()


class ShowProgress(TrainerCallback):
    """Shows steps, loss, training accuracy and the time left of the stage `name`."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self._open = ExitStack()
        self._update: Callable[..., None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.console.quiet:
            return
        warmup = args.get_warmup_steps(state.max_steps)
        if warmup >= state.max_steps:
            what = f"only {state.max_steps} steps, of which {warmup} warm the learning rate up: use a smaller batch, "
            self.console.print(labelled("  warning", what + "more epochs, or training.warmup_steps=0"), soft_wrap=True)
        if self.console.is_terminal:
            bar = progress_bar(f"  {self.name}", state.max_steps, console=self.console)
            self._update = self._open.enter_context(bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._update is not None:
            self._update(completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        tied = logs is not None and logs.get("rewards/margins") == 0  # nobody prefers either side of a pair yet
        shown = {k: title for k, title in SHOWN.items() if logs and k in logs and not (tied and "accura" in k)}
        numbers = "  ".join(f"{title} {logs[key]:z.3f}" for key, title in shown.items() if logs)
        if not numbers or not state.is_world_process_zero or self.console.quiet:
            return
        if self._update is not None:
            self._update(numbers=numbers)
        else:
            self.console.print(
                f"  {self.name}: step {state.global_step} of {state.max_steps}  {numbers}", soft_wrap=True
            )

    def close(self, *state: Any, **kwargs: Any) -> None:
        """Take the bar off the screen (also after an error)."""
        self._open.close()
        self._update = None

    on_train_end = close
