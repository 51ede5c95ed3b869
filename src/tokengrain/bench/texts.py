"""The corruption test on a model and rows of one's own: where answers and credit sources come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.bench.corruption import NEIGHBOURS, Corrupted, chance_top1, corrupt, corruption_test
from tokengrain.callables import nearest
from tokengrain.errors import RecipeError
from tokengrain.files import write_json

if TYPE_CHECKING:
    from tokengrain.training.workshop import Workshop

BASELINES = ("random", "surprise")
OF_THE_START = ("surprise", "entropy", "contrastive")
"""Sources that ask the starting model, unless told otherwise."""
FROM_ROWS = ("column", "spans")
"""Sources that repeat what stands in the rows."""
RESULT = "credit.json"
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
    neighbours: int = NEIGHBOURS,
    output: str | Path = "runs/bench/corruption",
    console: Console | None = None,
) -> dict[str, Any]:
    """The corruption test on real text; `random` and `surprise` are always among the sources.

    Args:
        model: folder, hub name or world://: its tokenizer reads the rows, and it is the reference of sources
            that need one (None: the model of the first run folder among the sources).
        data: rows with good answers (of pairs the chosen ones): file, hub name or world://.
        sources: each a name of a credit source, a recipe's `credit:` as YAML ("{name: guide, model: ...}"), or
            a run folder, whose credit is taken (without one: its reward model's scores, or the log-ratio of its
            policy to its start).
        credit: your own: functions `(batch) -> [N]`, or import strings of them.
        how, tokens, seed: see `corrupt`; one part of the result for each of `how`.
        rows: at most so many answers.
        neighbours: see `corruption_test`.
        output: folder of `credit.json` and `credit.html`.
        console: where progress is shown.

    Returns:
        The content of `credit.json`: `corruptions`, one entry per `how`, with `sources` as `corruption_test`
        gives them.

    Raises:
        RecipeError: no model, an unknown source, or settings that a source does not have.
    """
    from rich.progress import track

    from tokengrain.bench.markdown import write_markdown
    from tokengrain.bench.page import write_page

    console = console or Console(stderr=True)
    model = model or _model_of_runs(sources)
    shop, stage = _workshop(model, data, {"name": "surprise", "model": model}, rows)
    tokenizer = shop.tokenizer(stage.model)
    batch = _answers(shop, stage, rows)
    from tokengrain.bench.sources import own_source

    named = [_source(text, model, data) for text in [*BASELINES, *(s for s in sources if s not in BASELINES)]]
    for own in (own_source(c) for c in credit):
        named.append((own.name, own.build(None)))  # type: ignore[arg-type]  # a function of one's own needs no bench
    listed: dict[str, Callable[[TokenBatch], Tensor]] = {}
    for name, source in named:
        listed[name if name not in listed else f"{name} ({len(listed)})"] = source
    parts: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for way in track(how, description="corruptions", console=console, transient=True):
        scorer = shop.frozen(stage.model) if way == "unlikely" else None
        spoilt = corrupt(batch, tokenizer, how=way, tokens=tokens, seed=seed, model=scorer)  # type: ignore[arg-type]  # one of HOW
        entries, values = corruption_test(listed, spoilt, neighbours=neighbours, seed=seed)
        part = {"how": way, "chance_top1": chance_top1(spoilt), "left_out": spoilt.left_out, "sources": entries}
        parts.append(part)
        samples = samples or _samples(spoilt, tokenizer, values)
    result = {
        "kind": "bench-corruption",
        "date": date.today().isoformat(),
        "model": model,
        "data": data,
        "answers": batch.n_prompts,
        "tokens": tokens,
        "neighbours": neighbours,
        "seed": seed,
        "corruptions": parts,
        "samples": samples,
    }
    write_json(Path(output) / RESULT, result)
    write_page(result, Path(output))
    write_markdown(result, Path(output))
    return result


def _model_of_runs(sources: Sequence[str]) -> str:
    from tokengrain.recipe import load_recipe
    from tokengrain.runs import is_run

    for text in sources:
        if is_run(text):
            found = load_recipe(Path(text) / "recipe.yaml").model.path
            if found is not None:
                return found
    raise RecipeError("the corruption test needs a model: give one with --model, or a run folder as a source")


def _workshop(model: str, data: str, credit: Any, rows: int | None = None) -> tuple[Workshop, Any]:
    """A recipe of one annotate stage with this credit, which loads what it names."""
    from accelerate import PartialState

    from tokengrain.recipe import make_recipe, resolve_stages
    from tokengrain.training.workshop import Workshop

    values = {
        "method": "bench",
        "model": {"path": model},
        "data": {"train": data, "eval_fraction": 0.0, "limit": rows},
        "output_dir": "runs/bench",
        "stages": {"credit": {"kind": "annotate", "credit": credit}},
    }
    recipe = make_recipe(values, source="bench credit")
    return Workshop(recipe, Console(quiet=True), PartialState()), resolve_stages(recipe)[-1]


def _answers(shop: Workshop, stage: Any, rows: int) -> TokenBatch:
    """The good answers, one per prompt."""
    from tokengrain.data import prepare_sft
    from tokengrain.training.inputs import open_rows, tokenize_config
    from tokengrain.training.models import load_config, positions

    found, _ = open_rows(stage.data, seed=0)
    longest = positions(load_config(stage.model, shop.path(stage.model)))
    config = tokenize_config(stage.data)
    dataset = prepare_sft(found, shop.tokenizer(stage.model), config, model_positions=longest)
    return TokenBatch.from_samples([dataset[i] for i in range(min(rows, len(dataset)))])


def _source(text: str, model: str, data: str) -> tuple[str, Callable[[TokenBatch], Tensor]]:
    """`(name, source)` of a name, a YAML mapping or a run folder."""
    import yaml

    from tokengrain.credit import CREDIT
    from tokengrain.runs import is_run
    from tokengrain.training.sources import build_credit

    if is_run(text):
        return _of_run(Path(text))
    try:
        credit = yaml.safe_load(text)
    except yaml.YAMLError:
        credit = text
    credit = {"name": credit} if isinstance(credit, str) else credit
    if not isinstance(credit, dict):
        raise RecipeError(f"credit source {text!r} is neither a name, a YAML mapping nor a run folder")
    if credit.get("name") not in CREDIT:
        raise RecipeError(f"unknown credit {credit.get('name')!r}{nearest(str(credit.get('name')), CREDIT)}")
    if credit["name"] in OF_THE_START:
        credit = {"model": model, **credit}
    for needed in sorted(CREDIT[credit["name"]].objects & {"model", "reverse"}):
        if needed not in credit:
            example = f"'{{name: {credit['name']}, {needed}: PATH}}'"
            raise RecipeError(f"credit {credit['name']!r} needs its {needed}: give {example}, or a run folder")
    shop, stage = _workshop(model, data, credit)
    return credit["name"], build_credit(stage, shop.tokenizer(stage.model), shop)


def _of_run(path: Path) -> tuple[str, Callable[[TokenBatch], Tensor]]:
    """The credit of a run's last stage that makes one; else the scores of its reward model, or the log-ratio of its
    policy to where it started.

    Credit that came with the run's own rows says nothing about others.
    """
    from accelerate import PartialState

    from tokengrain.credit import GuideLogRatio
    from tokengrain.recipe import ModelSpec, load_recipe, resolve_stages
    from tokengrain.runs import read_run
    from tokengrain.training.sources import build_credit, credit_settings
    from tokengrain.training.workshop import Workshop

    run = read_run(path)
    recipe = load_recipe(path / "recipe.yaml", overrides=[f"output_dir={path}"])
    stages = resolve_stages(recipe)
    shop = Workshop(recipe, Console(quiet=True), PartialState())
    with_credit = [s for s in stages if s.credit is not None and credit_settings(s.credit)[0] not in FROM_ROWS]
    if with_credit:
        stage = with_credit[-1]
        name, _ = credit_settings(stage.credit or {})
        return f"{path.name}: {name}", build_credit(stage, shop.tokenizer(stage.model), shop)
    final = next(stage for stage in stages if stage.name == run.final_stage.name)
    if final.kind == "reward":
        last = (final.objective or {}).get("pooling") == "last"
        credit = {"name": "reward_model", "model": str(run.model_path), "broadcast": "last" if last else None}
        return f"{path.name}: reward_model", build_credit(
            replace(final, credit=credit), shop.tokenizer(final.model), shop
        )
    beta = (final.objective or {}).get("beta", 0.1)
    policy = shop.frozen(ModelSpec(path=str(run.model_path)))
    source = GuideLogRatio(model=policy, reference=shop.frozen(final.model), beta=beta)
    return f"{path.name}: log-ratio", source


def _samples(data: Corrupted, tokenizer: Any, credit: dict[str, tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Heat maps of the first answers: clean beside corrupted; first of all which tokens were corrupted."""
    from tokengrain.report import collect_credit_samples

    count = min(SHOWN, data.clean.n_prompts)
    shown = {"corrupted tokens": (torch.zeros(len(data.marked)), -data.marked.float()), **credit}
    batches = (data.clean, data.spoilt)
    samples = [
        Sample(
            data.clean.prompt(i).tolist(),
            [Completion(b.completion(i).tolist(), b.counted[_span(b, i)].tolist()) for b in batches],
            row=data.clean.rows[i],
        )
        for i in range(count)
    ]
    pairs = {}
    for name, values in shown.items():
        before, now = (b.segments.split(v) for b, v in zip(batches, values, strict=True))
        pairs[name] = torch.cat([part for i in range(count) for part in (before[i], now[i])])
    return collect_credit_samples(TokenBatch.from_samples(samples), tokenizer, pairs)


def _span(batch: TokenBatch, index: int) -> slice:
    start, end = batch.completion_offsets[index : index + 2].tolist()
    return slice(start, end)
