"""The corruption test: a few tokens of good answers are changed; does credit fall there, and only there?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from rich.progress import track
from torch import Tensor

from tokengrain.batch import Completion, TokenBatch
from tokengrain.bench.page import write_pages
from tokengrain.bench.questions import Credit, credit_and_cost
from tokengrain.bench.sources import own_source
from tokengrain.corruption import Corrupted, corrupt, counted_of
from tokengrain.data.dataset import prepare_sft
from tokengrain.errors import RecipeError, require
from tokengrain.evaluation.credit import added_auc, auc, lowest_hits
from tokengrain.evaluation.statistics import bootstrap
from tokengrain.method import CREDIT, make_credit
from tokengrain.models import load_config
from tokengrain.report.rows import collect_credit_samples
from tokengrain.run.build import CreditSpec, RunModels, open_rows, tokenize_config
from tokengrain.run.load import load_recipe, make_recipe, resolve_stages
from tokengrain.runs import is_run, read_run
from tokengrain.scoring.model import positions_of
from tokengrain.screen import Screen
from tokengrain.settings import code_named_by
from tokengrain.specs import ModelSpec

NEIGHBOURS = 3  # tokens after a corrupted one that are its neighbours: the model is still startled there
PART = 16
MEASURES = (
    "auc", "auc_neighbours", "auc_elsewhere", "gain", "drop", "drop_neighbours", "drop_elsewhere", "top1", "topk",
)  # fmt: skip


def corruption_test(
    sources: Mapping[str, Credit], data: Corrupted, *, neighbours: int = NEIGHBOURS, seed: int = 0
) -> tuple[list[dict[str, Any]], dict[str, tuple[Tensor, Tensor]]]:
    """An entry per source: the mean over answers of each of `MEASURES`, `deviation` (the unit of `drop`), its cost.

    `gain` needs a source named "surprise". The second value is the credit of each source: (clean, corrupted).
    """
    credit, costs = {}, {}
    for name, source in sources.items():
        before, _ = credit_and_cost(source, data.clean, PART)
        now, costs[name] = credit_and_cost(source, data.corrupted, PART)
        credit[name] = (before, now)
    entries = []
    for name, (before, now) in credit.items():
        deviation = float(before.std())
        columns = _per_answer(data, before, now, neighbours, deviation)
        if "surprise" in credit:
            columns["gain"] = added_auc(now, credit["surprise"][1], data.marked, data.corrupted.segments)
        measures = {name: _interval(values, seed) for name, values in columns.items()}
        entries.append({"source": name, "measures": measures, "deviation": deviation, **costs[name]})
    return entries, credit


def chance_top1(data: Corrupted) -> float:
    """`top1` and `topk` of credit that knows nothing: the mean share of corrupted tokens."""
    return float(data.corrupted.segments.mean(data.marked.double()).mean())


def surroundings(data: Corrupted, neighbours: int) -> tuple[Tensor, Tensor]:
    """Bool `[N]`: untouched tokens within `neighbours` after a corrupted one; other untouched ones after the first."""
    near, later = [], []
    for marked in data.corrupted.segments.split(data.marked):
        number = torch.arange(len(marked))
        last = torch.where(marked, number, -len(marked) - neighbours).cummax(0).values
        distance = number - last
        near.append(~marked & (distance <= neighbours))
        later.append(~marked & (distance > neighbours) & (last >= 0))
    return torch.cat(near), torch.cat(later)


def _per_answer(data: Corrupted, before: Tensor, now: Tensor, neighbours: int, deviation: float) -> dict[str, Tensor]:
    """Each measure of every answer `[C]`; NaN where it is not defined."""
    segments, marked = data.corrupted.segments, data.marked
    near, later = surroundings(data, neighbours)
    out = {name: torch.full((len(segments),), float("nan"), dtype=torch.float64) for name in MEASURES}
    fall = (before - now).double() / (deviation or float("nan"))
    parts = [segments.split(x) for x in (now, marked, near, later, fall)]
    for i, (credit, hit, beside, after, drop) in enumerate(zip(*parts, strict=True)):
        for name, others in (("auc", ~hit), ("auc_neighbours", beside), ("auc_elsewhere", ~hit & ~beside)):
            kept = hit | others
            out[name][i] = auc(-credit[kept], hit[kept])
        for name, those in (("drop", hit), ("drop_neighbours", beside), ("drop_elsewhere", after)):
            if those.any():
                out[name][i] = drop[those].mean()
    out["top1"] = lowest_hits(now, marked, segments)
    out["topk"] = lowest_hits(now, marked, segments, segments.sum(marked.long()))
    return out


def _interval(values: Tensor, seed: int) -> dict[str, Any]:
    """Mean over the answers where it is defined, with a 95 % bootstrap interval over them."""
    known = values[~values.isnan()]
    found: tuple[float | None, ...] = (None, None, None)
    if len(known):
        found = bootstrap(lambda means: means[..., 0], known[:, None], resamples=1000, seed=seed)
    return dict(zip(("mean", "low", "high"), found)) | {"answers": len(known)}


BASELINES = ("random", "surprise")
# Sources that ask the starting model, unless a model is given.
OF_THE_START = ("surprise", "lookahead", "entropy", "contrastive", "gradient_attribution")
FROM_ROWS = ("column", "spans")  # sources that repeat what stands in the rows
SHOWN = 4


def bench_corruption(
    model: str | None,
    data: str,
    *,
    sources: Sequence[str] = (),
    credit: Sequence[str | Callable[..., Any]] = (),
    how: Sequence[str] = ("random",),
    tokens: int = 2,
    rows: int = 200,
    seed: int = 0,
    output: str | Path = "runs/bench/corruption",
    console: Console | None = None,
) -> dict[str, Any]:
    """The corruption test on real text; `random` and `surprise` are always among the sources.

    Args:
        model: folder, hub name or world://: its tokenizer reads the rows, and it is the reference of sources that need
            one (None: the model of the first run folder among the sources).
        data: rows with good answers (of pairs the chosen ones): file, hub name or world://.
        sources: each a name of a credit source, a recipe's `credit:` as YAML ("{name: guide, model: ...}"), or a run
            folder: its credit, else its reward model's scores, else the log-ratio of its policy to its start.
        credit: your own: functions `(batch) -> [N]`, or import strings of them.
        rows: at most so many answers.

    Returns: The content of `credit.json`: `corruptions`, one entry per `how`.
    """
    console = console or Screen(stderr=True)
    model = model or _model_of_runs(sources)
    loaded, stage = _run_models(model, data, {"name": "surprise", "model": model}, rows)
    tokenizer = loaded.tokenizer(stage.model)
    found, _ = open_rows(stage.data, seed=0)
    longest = positions_of(load_config(stage.model, loaded.path(stage.model)))
    answers = prepare_sft(found, tokenizer, tokenize_config(stage.data), model_positions=longest)
    batch = TokenBatch.from_samples([answers[i] for i in range(min(rows, len(answers)))])
    named = [_source(text, model, data) for text in [*BASELINES, *(s for s in sources if s not in BASELINES)]]
    named += [(own.name, own.build(None)) for own in map(own_source, credit)]
    listed: dict[str, Credit] = {}
    for name, source in named:
        listed[name if name not in listed else f"{name} ({len(listed)})"] = source
    parts: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for way in track(how, description="corruptions", console=console, transient=True):
        scorer = loaded.frozen(stage.model) if way == "unlikely" else None
        corrupted = corrupt(batch, tokenizer, how=way, tokens=tokens, seed=seed, model=scorer)
        entries, values = corruption_test(listed, corrupted, seed=seed)
        chance = chance_top1(corrupted)
        parts.append({"how": way, "chance_top1": chance, "left_out": corrupted.left_out, "sources": entries})
        samples = samples or _samples(corrupted, tokenizer, values)
    result = {
        "kind": "bench-corruption",
        "date": date.today().isoformat(),
        "model": model,
        "data": data,
        "answers": batch.n_prompts,
        "tokens": tokens,
        "neighbours": NEIGHBOURS,
        "seed": seed,
        "corruptions": parts,
        "samples": samples,
    }
    write_pages(result, Path(output))
    return result


def _model_of_runs(sources: Sequence[str]) -> str:
    for recipe in (Path(text) / "recipe.yaml" for text in sources if is_run(text)):
        with code_named_by(recipe):
            found = load_recipe(recipe).model.path
        if found is not None:
            return found
    raise RecipeError("the corruption test needs a model: give one with --model, or a run folder as a source")


def _run_models(model: str, data: str, credit: Any, rows: int | None = None) -> tuple[RunModels, Any]:
    """A recipe of one annotate stage with this credit, which loads what it names."""
    values = {
        "method": "bench",
        "model": {"path": model},
        "data": {"train": data, "eval_fraction": 0.0, "limit": rows},
        "output_dir": "runs/bench",
        "stages": {"credit": {"kind": "annotate", "credit": credit}},
    }
    recipe = make_recipe(values, source="bench credit")
    return RunModels(recipe, Screen(quiet=True), PartialState()), resolve_stages(recipe)[-1]


def _source(text: str, model: str, data: str) -> tuple[str, Credit]:
    """`(name, source)` of a name, a YAML mapping or a run folder."""
    if is_run(text):
        return _of_run(Path(text))
    try:
        credit = yaml.safe_load(text)
    except yaml.YAMLError:
        credit = text
    credit = {"name": credit} if isinstance(credit, str) else credit
    known = isinstance(credit, dict)
    require(known, RecipeError, f"credit source {text!r} is neither a name, a YAML mapping nor a run folder")
    kind = CREDIT.find(str(credit.get("name")))
    if credit["name"] in OF_THE_START:
        credit = {"model": model, **credit}
    for needed in sorted(kind.objects & {"model", "reverse"}):
        example = f"'{{name: {credit['name']}, {needed}: PATH}}'"
        message = f"credit {credit['name']!r} needs its {needed}: give {example}, or a run folder"
        require(needed in credit, RecipeError, message)
    loaded, stage = _run_models(model, data, credit)
    return credit["name"], loaded.credit(stage.credit or {}, stage.model)


def _of_run(path: Path) -> tuple[str, Credit]:
    """The credit of a run's last stage that makes one; else the scores of its reward model, or the log-ratio of its
    policy to where it started. Credit that came with the run's own rows says nothing about others."""
    with code_named_by(path / "recipe.yaml"):
        run = read_run(path)
        recipe = load_recipe(path / "recipe.yaml", overrides=[f"output_dir={path}"])
        stages = resolve_stages(recipe)
        loaded = RunModels(recipe, Screen(quiet=True), PartialState())
        made = [(s, CreditSpec.of(s.credit).name) for s in stages if s.credit is not None]
        for stage, name in reversed(made):
            if name not in FROM_ROWS:
                return f"{path.name}: {name}", loaded.credit(stage.credit or {}, stage.model)
        final = next(stage for stage in stages if stage.name == run.final_stage.name)
        objective = final.objective or {}
        if final.kind == "reward":
            last = "last" if objective.get("pooling") == "last" else None
            credit = {"name": "reward_model", "model": str(run.model_path), "broadcast": last}
            return f"{path.name}: reward_model", loaded.credit(credit, final.model)
        policy = loaded.frozen(ModelSpec(path=str(run.model_path)))
        reference, beta = loaded.frozen(final.model), objective.get("beta", 0.1)
        return f"{path.name}: log-ratio", make_credit("guide", model=policy, reference=reference, beta=beta)


def _samples(data: Corrupted, tokenizer: Any, credit: dict[str, tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Heat maps of the first answers: clean beside corrupted; first of all which tokens were corrupted."""
    batches, samples = (data.clean, data.corrupted), []
    for i in range(min(SHOWN, data.clean.n_prompts)):
        completions = [Completion(b.completion(i).tolist(), counted_of(b, i)) for b in batches]
        samples.append(data.clean.sample(i, completions, raw={}))
    marks = {"corrupted tokens": (torch.zeros(len(data.marked)), -data.marked.float())}
    pairs = {}
    for name, values in (marks | credit).items():
        before, now = (b.segments.split(v) for b, v in zip(batches, values, strict=True))
        pairs[name] = torch.cat([part for i in range(len(samples)) for part in (before[i], now[i])])
    return collect_credit_samples(TokenBatch.from_samples(samples), tokenizer, pairs)
