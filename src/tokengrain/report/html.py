"""The report: one HTML file with everything in it, readable without network."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from torch import Tensor

from tokengrain import runs
from tokengrain.annotation import MANIFEST
from tokengrain.batch import TokenBatch
from tokengrain.errors import ModelError, RecipeError, RunError, foreign, require, write_text
from tokengrain.evaluation.statistics import Z
from tokengrain.method import METHODS
from tokengrain.report import rows
from tokengrain.report.pictures import RATED, drawn
from tokengrain.report.rows import WEAKEST, CreditSample, Side, by_pair, colour_scale, one_of_equals, read_token_rows
from tokengrain.report.svg import Mark, Point, Series, frontier_chart, line_chart, marker, number, signed
from tokengrain.runs import EQUAL, ROLLOUT_FILE
from tokengrain.screen import visible

NAME = "report.html"
MAX_PAIRS = 24
MAX_TOKENS = 600  # per completion; more is cut, and said so
MAX_PIECES = 20_000  # tokens in all heat maps of recorded rollouts together: about 1.4 MB
MAX_COMPLETIONS = 8  # of a recorded prompt
TRUTH = "exact advantage"
Metrics = Mapping[str, Any]
Part = dict[str, Any]  # of the page, as its template reads it


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a finished run or demo.

    Args:
        run_dir: folder of a run (`tokengrain train`) or of a demo.
        output: where to write; default `report.html` in the folder.

    Returns:
        The path of the file.

    Raises:
        RecipeError: an output that is no name of an HTML file.
        RunError: not a run folder, an unfinished run (says what is there and how to resume).
        RunError: a damaged file of the run, of `rollouts.jsonl` with the line.
        DataError: a damaged `credit_samples.json`; names the entry.
    """
    path = Path(output) if output is not None else Path(run_dir) / NAME
    page = path.suffix.lower() in (".html", ".htm")  # a file of rows is not to be replaced by a slip
    require(page, RecipeError, f"output is {str(path)!r}; expected a name that ends in .html")
    with foreign(f"{run_dir} cannot be shown, its files are not as tokengrain writes them: "):
        text = render(read_contents(run_dir))
    write_text(path, text)
    return path


def render(contents: Contents) -> str:
    pairs, scales = heat_maps(contents.samples)
    most = MAX_PIECES // max(len(contents.rollouts), 1)
    sizes = ((680, 400, "wide"), (360, 340, "narrow")) if contents.marks else ()
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            c=contents,
            pairs=pairs,
            scales=scales,
            cut=max(0, len(by_pair(contents.samples)) - MAX_PAIRS),
            plots=[frontier_chart(contents.frontier, contents.marks, *size) for size in sizes],
            stages=[rollout_maps(f"rollouts-{i}", name, of, most) for i, (name, of) in enumerate(contents.rollouts)],
            phases=[(title, svg, [(s.name, swatch(s)) for s in lines]) for title, svg, lines in contents.phases],
            held_out=any("held-out" in svg for _, svg in contents.charts),
            legend=[(s.name, swatch(s)) for s in contents.series],
            swatches={m["name"]: swatch(Series(m["name"], [], m["style"]), line=False) for m in contents.methods},
            best=_best(contents.methods),
        )
    )


def show_credit(
    batch: TokenBatch,
    tokenizer: Any,
    credit: Mapping[str, Tensor],
    *,
    truth: Tensor | None = None,
    maps: Sequence[list[Any]] = (),
    count: int = 3,
    height: int = 420,
) -> Shown:
    """Heat maps of token credit, for a notebook's cell.

    Args:
        batch: prompts with their completions, as `TokenBatch.from_samples` makes them.
        tokenizer: for the tokens' text.
        credit: `[N]` by the name that is shown: one number per completion token that counts.
        truth: the exact credit `[N]`, where a world knows it.
        maps: of prompts with pictures, what each patch is credited with (`tokengrain.report.pictures.patch_credit`).
        count: how many prompts are shown.
        height: of the cell's output, in pixels.
    """
    entries = rows.collect_credit_samples(batch, tokenizer, credit, truth=truth, maps=maps)  # by prompt
    page = maps_page(rows.parsed(entries[: count * len(credit)]))
    frame = '<iframe srcdoc="{}" style="width: 100%; height: {}px; border: 0" title="token credit"></iframe>'
    return Shown(frame.format(escape(page), height))


def maps_page(samples: Sequence[CreditSample]) -> str:
    """A page of nothing but heat maps."""
    pairs, scales = heat_maps(samples)
    page: str = environment().get_template("cell.html.j2").render(pairs=pairs, scales=scales)
    return page


def maps_table(samples: Sequence[CreditSample]) -> str:
    """The same as a table in Markdown, each token followed by its credit, for what shows no colours."""
    lines = ["| row | completion | credit | tokens |", "|---|---|---|---|"]
    for sample in one_of_equals(samples)[: 2 * MAX_PAIRS]:
        for name, side in zip(sample.names, sample.sides, strict=True):
            tokens = zip(side.tokens[:MAX_TOKENS], side.credit, strict=False)
            marked = "".join(t if v is None else f"{t}[{signed(v)}]" for t, v in tokens)
            cells = (" ".join(cell.split()) for cell in (str(sample.row), name, sample.source, visible(marked)))
            lines.append("| " + " | ".join(re.sub(r"([\\|<`*_])", r"\\\1", cell) for cell in cells) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Shown:
    """HTML that notebooks show in place of a value."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def environment() -> Any:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("tokengrain.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    found.filters.update(number=number, short=short, fixed=fixed, interval=interval, seconds=seconds)
    return found


def fixed(value: float | None, decimals: int = 2) -> str:
    """`value` with this many decimals, for a column of a table; "–" for nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:z.{decimals}f}".replace("-", "−")


def short(value: float | None) -> str:
    """`value` with two decimals; with two digits where these would all be 0."""
    rounds_to_zero = value is not None and 1e-6 < abs(value) < 0.005
    return number(value, 2) if rounds_to_zero else fixed(value)


Interval = tuple[float, float | None, float | None, int | None]  # value, low, high, of how many; None: not known


def interval(value: Interval | str | None) -> str:
    """ "0.71 (0.68 to 0.74, n = 200)", or only the value where no interval was measured; words as they are."""
    if value is None or isinstance(value, str):
        return value or "–"
    middle, low, high, n = value
    of = f", n = {n:,}" if n is not None else ""
    return short(middle) + (f" ({short(low)} to {short(high)}{of})" if low is not None and high is not None else "")


def seconds(value: float | None) -> str:
    """Seconds for people: "8.3 s", "2 min 5 s"."""
    if value is None:
        return "–"
    if value < 100:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{int(value) // 60} min {int(value) % 60} s"


def swatch(series: Series, line: bool = True) -> str:
    css = f"s{series.style} d{series.style}"
    inner = f'<path class="line {css}" d="M1 8H25"/>' if line else marker(8, 8, series.style)
    return f'<svg class="swatch" viewBox="0 0 {26 if line else 16} 16" aria-hidden="true">{inner}</svg>'


def _best(methods: Sequence[dict[str, Any]]) -> dict[str, str]:
    best = {}
    for column in ("true_reward", "frontier_share", "win_rate", "credit_spearman", "credit_auc"):
        known = [m for m in methods if isinstance(m.get(column), int | float)]
        if len(known) > 1:
            best[column] = max(known, key=lambda m: m[column])["name"]
    return best


WORLD = {
    "reward": "true reward",
    "kl": "KL to the base, nats per completion",
    "best_reward": "best possible reward at that KL",
    "share": "frontier share",
    "win_rate": "win rate against the base",
    "broken": "share of broken samples",
    "length": "tokens per completion",
    "entropy": "entropy, nats per token",
}
"""What a world measures, for people, in order."""
BASE_STYLE = 7  # grey
UNMOVED = 0.01  # nats per completion: a policy this near to the base has no share of the frontier


@dataclass
class Contents:
    kind: str
    title: str
    subtitle: str
    facts: list[tuple[str, str]]
    methods: list[dict[str, Any]] = field(default_factory=list)
    frontier: list[Point] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    world: list[dict[str, Any]] = field(default_factory=list)
    charts: list[tuple[str, str]] = field(default_factory=list)
    phases: list[tuple[str, str, list[Series]]] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    rollouts: list[tuple[str, list[rows.Recorded]]] = field(default_factory=list)
    samples: list[rows.CreditSample] = field(default_factory=list)
    stored_in: str = ""
    samples_per_prompt: int | None = None
    settings: str = ""
    versions: dict[str, Any] = field(default_factory=dict)


def read_contents(run_dir: str | Path) -> Contents:
    """Read a finished run or demo; the errors are those of `write_report`."""
    path = Path(run_dir)
    metrics = runs.read_object(path / "metrics.json")
    if metrics.get("kind") == "demo":
        return _demo(path, metrics)
    run = runs.read_run(path)
    require(run.status == "done", RunError, runs.unfinished_message(run))
    return _single(run)


def _demo(path: Path, metrics: Mapping[str, Any]) -> Contents:
    methods = [dict(m) for m in metrics.get("methods", [])]
    require(methods, RunError, f"{path / 'metrics.json'} has no methods: the demo did not finish; run it again")
    styles = _styles([str(m["name"]) for m in methods])
    for m in methods:
        m["style"] = styles[m["name"]]
        if (m.get("kl") or 0.0) < UNMOVED:
            m["frontier_share"] = None
        m |= {f"{key}_half": Z * m[f"{key}_se"] for key in ("kl", "true_reward") if m.get(f"{key}_se")}
    marks = [
        Mark(m["name"], m.get("kl") or 0.0, m["true_reward"], m.get("kl_half"), m.get("true_reward_half"), m["style"])
        for m in methods
        if m.get("true_reward") is not None
    ]
    logs: list[tuple[str, int, list[dict[str, Any]]]] = []
    for folder in sorted(p for p in path.iterdir() if runs.is_run(p)):
        trained = [log for s in runs.read_run(folder).stages if s.kind == "train" and (log := s.log())]
        name = next((m["name"] for m in methods if _slug(m["name"]) == _slug(folder.name)), folder.name)
        if trained:
            logs.append((name, styles.get(name, len(logs)), trained[-1]))
    logs.sort(key=lambda item: item[1])
    facts = [(name, metrics.get(name)) for name in ("date", "command", "seed", "machine", "world")]
    return Contents(
        kind="demo",
        title="Which tokens earned the reward?",
        subtitle="Preference methods on a world whose optimum is known exactly.",
        facts=_texts(facts),
        methods=methods,
        frontier=[(float(x), float(y)) for x, y in metrics.get("frontier") or []],
        marks=marks,
        charts=charts(logs),
        series=[Series(name, [], style) for name, style, _ in logs],
        samples=rows.read_credit_samples(path / rows.FILE),
        samples_per_prompt=metrics.get("samples_per_prompt"),
        versions=dict(metrics.get("versions") or {}),
    )


def _styles(names: Sequence[str]) -> dict[str, int]:
    others = [name for name in names if _slug(name) != "base"]
    return {name: others.index(name) % 7 if name in others else BASE_STYLE for name in names}


def _slug(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _single(run: runs.Run) -> Contents:
    info, top = run.info, run.metrics
    date = info.get("finished")  # "2025-01-31T12:00:00+00:00" as "2025-01-31 12:00 UTC"
    date = date and date[:16].replace("T", " ") + " UTC" * date.endswith("+00:00")
    facts = [("method", run.method), ("date", date), ("command", info.get("command"))]
    facts += [(name, top.get(name)) for name in ("model", "data", "seed")]
    logs = [(s.name, i, s.log()) for i, s in enumerate(s for s in run.stages if s.log())]
    samples = rows.read_credit_samples(run.path / rows.FILE)
    if not samples and run.credit_stages:
        with suppress(ModelError):  # no tokenizer: the page says so
            samples = read_token_rows(run.path, count=8)
    return Contents(
        kind="run",
        title=METHODS[run.method].title if run.method in METHODS else run.method,
        subtitle=f"Run folder {run.path.name}: {len(run.stages)} stage{'s' * (len(run.stages) != 1)}.",
        facts=_texts(facts),
        stages=[_stage(s) for s in run.stages],
        world=_world(run.path / "evaluation.json"),
        charts=charts(logs),
        phases=phase_charts(logs),
        series=[Series(name, [], style) for name, style, _ in logs],
        rollouts=[(s.name, rows.read_rollouts(s.path / ROLLOUT_FILE)) for s in run.stages if s.kind == "online"],
        samples=samples,
        stored_in=", ".join(s.name for s in run.credit_stages),
        settings=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True) if run.recipe else "",
        versions=dict(info.get("versions") or {}),
    )


def _stage(stage: runs.StageRecord) -> dict[str, Any]:
    """A stage's part of the summary: its name, kind, seconds and held-out numbers before and after."""
    metrics = stage.metrics
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    before, after = _unequal(before), _unequal(after)
    return {
        "name": stage.name,
        "kind": stage.kind,
        "seconds": stage.seconds,
        "note": _note(stage),
        "answers": _answers(stage),
        **_compared(before, after, runs.TITLES, metrics.get("held_out")),
    }


def _answers(stage: runs.StageRecord) -> list[tuple[str, str, str]]:
    """Prompts, and what the model said to them before and after training."""
    said = runs.read_object(path) if (path := stage.path / runs.ANSWERS).is_file() else {}
    parts = [said.get(name) for name in ("prompts", "start", "trained")]
    if not all(isinstance(part, list) and all(isinstance(text, str) for text in part) for part in parts):
        return []
    shown = ((visible(text.strip()) for text in row) for row in zip(*parts, strict=False))
    return [(prompt, start, end) for prompt, start, end in shown]


def _ties(metrics: Mapping[str, Any]) -> bool:
    """Whether the policy tells no chosen completion from its rejected one, but for rounding."""
    margins = (metrics.get(f"{prefix}rewards/margins") for prefix in ("", "eval_"))
    return any(isinstance(margin, int | float) and abs(margin) < 1e-6 for margin in margins)


def _unequal(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metrics without an accuracy of a policy that still is its reference."""
    if "comparison" not in metrics and not _ties(metrics):
        return metrics
    return {k: EQUAL if "accura" in k and not k.endswith(("_low", "_high")) else v for k, v in metrics.items()}


def _note(stage: runs.StageRecord) -> str:
    if stage.kind == "init":
        return "A new model, not trained yet."
    manifest = stage.path / MANIFEST
    if stage.kind != "annotate" or not manifest.is_file():
        return "No held-out numbers were measured in this stage."
    files = runs.read_object(manifest).get("files", {})
    return "Token rewards of " + ", ".join(f"{f['rows']} rows in {name}" for name, f in sorted(files.items()))


def _world(path: Path) -> list[dict[str, Any]]:
    """What `tokengrain evaluate` measured in a world: the base and the trained model."""
    found = runs.read_object(path)
    after = found.get("world") or {}
    return _compared(found.get("world_base") or {}, after, WORLD, after.get("samples"))["rows"]


def _compared(before: Metrics, after: Metrics, titles: Mapping[str, str], n: int | None) -> dict[str, list[Part]]:
    """A table of numbers before and after: `rows` those with a title, `more` the others; intervals are of n."""
    names = [m for m in {**after, **before} if is_shown(m, {**before, **after}[m])]

    def row(name: str) -> dict[str, Any]:
        # "eval_rewards/accuracies" becomes "rewards: accuracies"
        title = titles.get(name) or name.removeprefix("eval_").replace("/", ": ").replace("_", " ")
        title += " (95 % interval)" * (f"{name}_low" in {**before, **after})
        return {"name": title, "before": with_interval(before, name, n), "after": with_interval(after, name, n)}

    more = [m for m in names if m not in titles and not (m == "rewards/accuracies" and "accuracy" in names)]
    return {"rows": [row(m) for m in titles if m in names], "more": [row(m) for m in more]}


def is_shown(name: str, value: Any) -> bool:
    """Whether a metric is a number of its own (not an end of another's interval, not bookkeeping)."""
    plain = name.removeprefix("eval_")
    if plain.endswith(("_low", "_high", "_se", "_per_second")) or plain in ("epoch", "step", "runtime"):
        return False
    return isinstance(value, int | float) and not isinstance(value, bool)


def with_interval(metrics: Mapping[str, Any], name: str, n: int | None = None) -> Interval | str | None:
    """A metric with its interval over n rows or samples; low and high are None where none was measured."""
    value = metrics.get(name)
    if not isinstance(value, int | float):
        return EQUAL if value == EQUAL else None
    return float(value), metrics.get(f"{name}_low"), metrics.get(f"{name}_high"), n


def _texts(facts: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in facts if value is not None]


# Title of a chart, and the names that its quantity has in logs (first match wins; "eval_" marks held-out values).
CURVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss",)),
    ("reward", ("reward/mean", "reward")),
    ("correct, share of completions", ("reward/correct", "correct")),
    ("pair accuracy", ("rewards/accuracies", "accuracy", "accuracies")),
    ("reward margin", ("rewards/margins", "margin", "margins")),
    ("utilisation: completions with credit, share", ("rollout/utilisation",)),
    ("clipped tokens, share", ("clip/tokens",)),
    ("KL to the reference, nats per token", ("kl", "kl_per_token", "sequence_kl", "kl/ref", "rollout/kl_ref")),
    ("KL to the sampling policy, nats per token", ("kl/old",)),
    ("entropy, nats per token", ("entropy", "rollout/entropy")),
    ("tokens per completion", ("rollout/length", "length")),
    ("gradient norm", ("grad_norm",)),
)
PHASES = ("rollout", "reward", "scoring", "credit", "update")
"""What a step of online training is made of; logged as `seconds/<phase>`."""
Logs = Sequence[tuple[str, int, list[dict[str, Any]]]]  # (stage, style, rows of its log)


def charts(logs: Logs) -> list[tuple[str, str]]:
    """(title, svg) of every quantity that was logged; training values as lines, held-out ones dashed."""
    found = []
    for title, names in CURVES:
        series = [
            Series(stage + " (held out)" * bool(prefix), points, style, dashed=bool(prefix))
            for stage, style, log in logs
            for prefix in ("", "eval_")
            if (points := _points(log, [prefix + n for n in names]))
        ]
        if svg := line_chart(title, series, "step"):
            found.append((title, svg))
    return found


def phase_charts(logs: Logs) -> list[tuple[str, str, list[Series]]]:
    """(title, svg, lines) for each stage that logged where its time went; the lines are phases, not stages."""
    found = []
    for stage, _, log in logs:
        points = [(name, i, _points(log, [f"seconds/{name}"])) for i, name in enumerate(PHASES)]
        series = [Series(name, p, style) for name, style, p in points if p]
        title = f"seconds per rollout, {stage}"
        if svg := line_chart(title, series, "step"):
            found.append((title, svg, series))
    return found


def _points(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Point]:
    """(step, value) of the first of `names` that is in the log; accuracies where not all pairs are ties."""
    for name in names:
        pairs = [(r.get("step"), r.get(name)) for r in rows if not ("accura" in name and _ties(r))]
        found = [(float(x), float(y)) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)]
        if found := [(x, y) for x, y in found if math.isfinite(y)]:
            return found
    return []


class Piece(NamedTuple):
    """A token of a heat map: white space before it, its text, strength 0..1, sign class, numbers, mark if clipped."""

    lead: str
    text: str
    strength: str
    sign: str
    credit: str
    truth: str | None
    mark: str = ""


def heat_maps(samples: Sequence[CreditSample]) -> tuple[list[dict[str, Any]], list[tuple[str, float]]]:
    """Pairs for the template, each with all its sources, and the value that gets full colour per source."""
    samples = one_of_equals(samples)
    values: dict[str, list[float | None]] = {}
    truths = [v for s in samples for side in s.sides for v in side.truth or ()]
    if truths:
        values[TRUTH] = truths
    for s in samples:
        values.setdefault(s.source, []).extend(v for side in s.sides for v in side.credit)
    scales = {name: colour_scale(found) for name, found in values.items()}
    pairs = []
    for group in by_pair(samples)[:MAX_PAIRS]:
        first, sides = group[0], []
        for i, name in enumerate(first.names):
            tokens, truth = first.sides[i].tokens, first.sides[i].truth
            shown = [(TRUTH, Side(tokens, truth))] if truth is not None else []
            shown += [(s.source, s.sides[i]) for s in group]
            maps = [{"source": source, "pieces": pieces(side, scales[source])} for source, side in shown]
            sides.append({"name": name, "maps": maps, "cut": max(0, len(tokens) - MAX_TOKENS)})
        views: dict[str | None, tuple[Any, ...]] = {}  # by how patches are rated; without, where none are
        for s in group:
            views.setdefault(next((p.get("by", "gradient") for p in s.pictures if p.get("patches")), None), s.pictures)
        rated = {by: pictures for by, pictures in views.items() if by is not None} or views
        pictures = [(RATED.get(str(by), ""), [drawn(p) for p in seen]) for by, seen in rated.items() if seen]
        about = {"prompt": visible(first.prompt.strip()), "row": first.row, "pictures": pictures}
        pairs.append({**about, "sides": sides})
    return pairs, list(scales.items())


def pieces(side: Side, scale: float) -> list[Piece]:
    """A completion's tokens as the template needs them."""
    out = []
    truths = side.truth if side.truth is not None else [None] * len(side.tokens)
    marks = side.clipped if side.clipped is not None else [0] * len(side.tokens)
    for text, value, truth, mark in list(zip(side.tokens, side.credit, truths, marks, strict=True))[:MAX_TOKENS]:
        strength = 0.0 if value is None else min(1.0, abs(value) / scale)
        sign = "z" if value is None or strength < WEAKEST else ("p" if value > 0 else "n")
        text = visible(text)
        word = text.lstrip(" ")
        piece = Piece(
            lead=" " * (len(text) - len(word)) if word else "",
            text=(word or text).replace("\n", "↵\n") or "·",
            strength=f"{strength:.2f}".rstrip("0").rstrip("."),
            sign=sign,
            credit="not counted" if value is None else signed(value),
            truth=None if truth is None else signed(truth),
            mark=("", "high", "low")[mark],
        )
        out.append(piece)
    return out


def rollout_maps(identity: str, name: str, completions: Sequence[rows.Recorded], most: int = MAX_PIECES) -> Part:
    """A stage's recorded rollouts for the template, with at most `most` tokens in all heat maps, evenly spread."""
    there = rows.recorded_columns(completions)
    columns = [c for c in rows.VIEWS if c in there]
    scales = {c: rows.scale_of(rows.side_of(one, c) for one in completions) for c in columns}
    groups = rows.by_prompt(completions)
    sides = [[_rollout_sides(one, columns) for one in group[:MAX_COMPLETIONS]] for group in groups]
    sizes = [sum(len(side.tokens) for maps in group for side in maps.values()) for group in sides]
    return {
        "id": identity,
        "name": name,
        "columns": [(c, rows.VIEWS[c], scales[c]) for c in columns],
        "steps": [_rollout_step(groups[i], sides[i], scales) for i in rows.spread(sizes, most)],
        "recorded": len(groups),
        "clipped": any(one.clipped is not None for one in completions),
        "others": [c for c in there if c not in columns],
    }


def _rollout_sides(one: rows.Recorded, columns: Sequence[str]) -> dict[str, Side]:
    """The heat maps of a completion by column, cut to what is shown; a plain one if it has no numbers."""
    there = [c for c in columns if c in one.columns] or [""]
    return {c: rows.merged(rows.side_of(one, c, MAX_TOKENS)) for c in there}


def _rollout_step(group: Sequence[rows.Recorded], sides: Sequence[dict[str, Side]], scales: dict[str, float]) -> Part:
    """The completions of a prompt, of which as many are shown as have `sides`."""
    marks = [m for one in group for m in one.clipped or ()]
    completions = []
    for one, by_column in zip(group, sides, strict=False):
        maps = [
            {"source": rows.view_of(c).title, "column": c, "pieces": pieces(side, scales.get(c, 1.0))}
            for c, side in by_column.items()
        ]
        completions.append({"of": one, "cut": max(0, len(one.tokens) - MAX_TOKENS), "maps": maps})
    return {
        "first": group[0],
        "prompt": visible(group[0].prompt.strip()),
        "rewards": [one.reward for one in group],
        "clipped": sum(m != 0 for m in marks) / len(marks) if marks else None,
        "completions": completions,
        "left": len(group) - len(completions),
    }
