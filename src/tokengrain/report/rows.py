"""Numbers per token for looking at: credit samples, rows with token rewards or spans, and recorded rollouts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tokengrain import runs
from tokengrain.annotation import column_name, read_manifest
from tokengrain.batch import TokenBatch
from tokengrain.data.config import RowError, SpanConfig, TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.rows import StoredRows, load_rows, with_columns
from tokengrain.data.tokens import text_tokenizer, token_texts
from tokengrain.errors import DataError, ModelError, RunError, problem, read_json, regular_file, require, shown
from tokengrain.models import load_reader
from tokengrain.report import svg
from tokengrain.report.pictures import By, is_picture
from tokengrain.report.pictures import shown as shown_pictures
from tokengrain.runs import LOG_RATIO, ROLLOUT_FILE
from tokengrain.settings import LARGEST, code_named_by
from tokengrain.specs import ModelSpec
from tokengrain.worlds import is_world, load_world

# `credit_samples.json` in a run folder is a list with one entry per pair (or row, with `chosen` only) and source:
#
#     {"prompt": str, "source": str, "row": int | str,
#      "chosen":   {"tokens": [str], "credit": [float], "truth": [float]},
#      "rejected": {"tokens": [str], "credit": [float], "truth": [float]}}
#
# Of a prompt with pictures also "pictures": [{"png": base64, "size": [width, height], "patches": [[float]]}], the last
# optional: what each patch of the picture is credited with.
#
# `tokens` give the completion when joined; `credit` has one number per token, or null for a token that does not count;
# `truth` (optional) is the exact advantage, where the world knows it.

FILE = "credit_samples.json"
SIDES = ("chosen", "rejected")
WEAKEST = 0.04  # of full colour; below it a token stays plain


class Side(NamedTuple):
    """One completion: its tokens, their credit (None where a token does not count), the truth if known.

    `clipped`, of a rollout: -1, 0 or 1 per token, for a ratio that was clipped below, not clipped, clipped above.
    """

    tokens: Sequence[str]
    credit: Sequence[float | None]
    truth: Sequence[float | None] | None = None
    clipped: Sequence[int] | None = None


@dataclass(frozen=True)
class CreditSample:
    """One pair as seen by one credit source; `sides` is (chosen, rejected) or a single completion."""

    prompt: str
    source: str
    sides: tuple[Side, ...]
    row: int | str | None = None
    pictures: tuple[Mapping[str, Any], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sides."""
        return SIDES if len(self.sides) == 2 else ("completion",)


def collect_credit_samples(
    batch: TokenBatch,
    tokenizer: Any,
    credit: Mapping[str, Tensor],
    *,
    truth: Tensor | None = None,
    maps: Sequence[list[Any]] = (),
    by: By = "gradient",
) -> list[dict[str, Any]]:
    """The entries of `credit_samples.json` for the prompts of a batch, from credit `[N]` by source.

    `maps` are the values of each prompt's patches, as `patch_credit` gives them, rated `by`.
    """
    values = {name: _listed(batch, tensor) for name, tensor in credit.items()}
    exact = _listed(batch, truth) if truth is not None else None
    entries: list[dict[str, Any]] = []
    groups = batch.group.tolist()
    for g in range(batch.n_prompts):
        seen = bool(batch.vision) and batch.vision[g] is not None
        ids = batch.prompt(g).tolist()
        about: dict[str, Any] = {"prompt": prompt_text(tokenizer, ids) if seen else tokenizer.decode(ids)}
        if seen and batch.raw:
            about["pictures"] = shown_pictures(batch.raw[g], maps[g] if maps else None, by=by)
        row = {"row": batch.rows[g]} if batch.rows else {}
        completions = [c for c, group in enumerate(groups) if group == g]
        texts = {c: token_texts(tokenizer, batch.completion(c).tolist()) for c in completions}
        for name, lists in values.items():
            entry: dict[str, Any] = {**about, "source": name, **row}
            for side, c in zip(SIDES, completions, strict=False):
                entry[side] = {"tokens": texts[c], "credit": lists[c]} | ({"truth": exact[c]} if exact else {})
            entries.append(entry)
    return entries


def prompt_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """A prompt's text with every run of a picture's tokens as one of them."""
    runs = [(token, len(list(run))) for token, run in groupby(ids)]
    special = set(tokenizer.all_special_ids)
    return str(tokenizer.decode([t for t, n in runs for _ in range(1 if t in special else n)]))


def _listed(batch: TokenBatch, values: Tensor) -> list[list[float | None]]:
    """Flat `[N]` to one list per completion, None where a token does not count."""
    if values.shape != (batch.segments.total,):
        raise ValueError(f"credit has shape {tuple(values.shape)}, expected ({batch.segments.total},)")
    numbers = iter(values.detach().float().cpu().tolist())
    flat = [round(next(numbers), 6) if keep else None for keep in batch.counted.tolist()]
    return [flat[start:end] for start, end in pairwise(batch.completion_offsets.tolist())]


def read_credit_samples(path: Path) -> list[CreditSample]:
    """Read and check `credit_samples.json`; an absent file is an empty list."""
    if not path.exists():
        return []
    entries = read_json(path, DataError)
    kind = type(entries).__name__
    require(isinstance(entries, list), DataError, "wrong content", file=path, value=kind, expected="a list of samples")
    return parsed(entries, path)


def parsed(entries: Sequence[Any], path: Path | None = None) -> list[CreditSample]:
    """The entries of `credit_samples.json`, checked; `path` is for messages."""
    return [_parse(path, row, entry) for row, entry in enumerate(entries)]


def _parse(path: Path | None, row: int, entry: Any) -> CreditSample:
    right = isinstance(entry, dict) and "chosen" in entry
    require(right, DataError, "not a credit sample", file=path, row=row, expected="an object with a 'chosen' side")
    sides, place = [], {"file": path, "row": row}
    for name in (name for name in SIDES if name in entry):
        side = entry[name]
        right = isinstance(side, dict)
        require(right, DataError, "not a side of a pair", **place, field=name, value=side, expected="an object")
        tokens, credit, truth = side.get("tokens", []), side.get("credit", []), side.get("truth")
        right = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
        details = {**place, "field": f"{name}.tokens", "value": tokens, "expected": "the text of each"}
        require(right, DataError, "no tokens", **details)
        for key, values in {"credit": credit, **({} if truth is None else {"truth": truth})}.items():
            here = {**place, "field": f"{name}.{key}"}
            require(isinstance(values, list), DataError, "not lists", **here, value=values, expected="a list")
            _check_numbers(values, len(tokens), gaps=True, **here)
        sides.append(Side(tokens, credit, truth))
    pictures = entry.get("pictures", [])
    what, expected = "no pictures", "a list of {png, size, patches}"
    require(isinstance(pictures, list), DataError, what, **place, field="pictures", value=pictures, expected=expected)
    for picture in pictures:
        require(is_picture(picture), DataError, what, **place, field="pictures", value=picture, expected=expected)
    about = str(entry.get("prompt", "")), str(entry.get("source", "")), tuple(sides), entry.get("row")
    return CreditSample(*about, tuple(pictures))


def _check_numbers(values: Sequence[Any], tokens: int, *, gaps: bool, **place: Any) -> None:
    """Raise a DataError unless there is one finite number for each token, or None where `gaps` are allowed."""
    found, expected = f"{len(values)} numbers", f"{tokens}, one per token"
    message = "the numbers do not fit the tokens"
    require(len(values) == tokens, DataError, message, **place, value=found, expected=expected)
    for i, value in enumerate(values):
        if not (isinstance(value, int | float) and abs(value) <= LARGEST) and not (gaps and value is None):
            raise DataError(f"token {i} has no finite number", **place, value=value, expected="a number")


def by_pair(samples: Sequence[CreditSample]) -> list[list[CreditSample]]:
    """Samples of the same pair together, in order of first appearance; all get the first one's row.

    A pair is known by its text, as an annotated file numbers its rows anew; the same text again is another.
    """
    groups: dict[Any, list[CreditSample]] = {}
    seen: Counter[Any] = Counter()
    for s in samples:
        text = s.prompt, tuple(tuple(side.tokens) for side in s.sides)
        group = groups.setdefault((text, seen[text, s.source]), [])
        seen[text, s.source] += 1
        group.append(replace(s, row=group[0].row) if group else s)
    return list(groups.values())


def one_of_equals(samples: Sequence[CreditSample]) -> list[CreditSample]:
    """Samples without sources whose heat maps would equal an earlier source's, which then names both.

    Maps are equal if all credit is the same but for a positive factor: colour is relative to a source's own scale. Of a
    credit and a log-ratio the credit is shown.
    """
    values: dict[str, dict[Any, float | None]] = {}
    for place, group in enumerate(by_pair(samples)):
        for s in group:
            numbered = ((i, j, v) for i, side in enumerate(s.sides) for j, v in enumerate(side.credit))
            values.setdefault(s.source, {}).update({(place, i, j): v for i, j, v in numbered})
    titles: dict[str, str] = {}
    for source, mine in sorted(values.items(), key=lambda item: item[0].startswith(LOG_RATIO)):
        for first in titles:
            if (factor := _factor(mine, values[first])) is not None:
                same = "" if abs(factor - 1) < 1e-3 else f"{svg.number(factor, 2)} × "
                titles[first] += f" = {same}{source}"
                break
        else:
            titles[source] = source
    return [replace(s, source=titles[s.source]) for s in samples if s.source in titles]


def _factor(values: Mapping[Any, float | None], base: Mapping[Any, float | None]) -> float | None:
    """The f > 0 with base = f · values up to rounding; None if there is none or all values are 0."""
    if values.keys() != base.keys() or any((values[k] is None) != (base[k] is None) for k in values):
        return None
    pairs = [(v, b) for k, v in values.items() if v is not None and (b := base[k]) is not None]
    squares = sum(v * v for v, _ in pairs)
    factor = sum(v * b for v, b in pairs) / squares if squares else 0.0
    largest = max((abs(b) for _, b in pairs), default=0.0)
    near = all(abs(b - factor * v) <= 1e-3 * largest for v, b in pairs)
    return factor if factor > 0 and near else None


def colour_scale(values: Sequence[float | None]) -> float:
    """The |credit| that gets full colour: the 98th percentile, so that one outlier does not pale the rest."""
    sizes = sorted(abs(v) for v in values if v is not None) or [1.0]
    return sizes[math.ceil(0.98 * len(sizes)) - 1] or sizes[-1] or 1.0


ROLES = ("chosen", "rejected", "completion")
Row = Mapping[str, Any]
Numbers = Sequence[int] | None  # of rows; None: the first ones
CREDIT = "token_rewards"
SPANS = "spans"


def read_token_rows(
    source: str | Path,
    *,
    rows: Sequence[int] | None = None,
    count: int = 3,
    field: str = CREDIT,
    tokenizer: Any = None,
    spans: Any = None,
) -> list[CreditSample]:
    """Rows with their token rewards, or another number per token.

    Args:
        source: a file of rows (`tokengrain.data.load_rows`) with `chosen_token_rewards` and
            `rejected_token_rewards` or `token_rewards`; a `credit_samples.json`; or the folder of a run or demo.
        rows: row numbers, counted from 0; None: the first `count` rows.
        field: which per-token quantity, for example "ref_logps" or "spans".
        tokenizer: tokenizer, or its path or name; needed where the file does not lie in a run folder.
        spans: with `field` "spans": mark them anew, from this source (a `SpanConfig`, a mapping of its fields, or
            "diff", "tags", ...). Default: those that are stored, else the run's source, else what the columns of
            the row suggest, else the diff.
    """
    path = Path(source)
    if path.is_dir() and field == SPANS:
        return _spans_of_run(path, rows, count, tokenizer, spans)
    if path.is_dir():
        return _from_folder(path, rows, count, field, tokenizer)
    if path.name == FILE:
        message = "there are only token rewards"
        require(field == CREDIT, DataError, message, file=path, value=field, expected=CREDIT)
        return _picked(read_credit_samples(path), rows, count, path)
    return _from_file(path, rows, count, field, tokenizer, {} if spans is None else {"spans": spans})


def _picked(samples: Sequence[CreditSample], rows: Numbers, count: int, path: Path) -> list[CreditSample]:
    """Samples of the wanted rows; a pair seen by several sources is one row."""
    groups = by_pair(samples)
    names = [g[0].row if g[0].row is not None else i for i, g in enumerate(groups)]
    wanted = names[:count] if rows is None else list(rows)
    for row in wanted:
        require(row in names, DataError, "there is no such row", file=path, row=row, expected=f"one of {names[:20]}")
    return [s for name, group in zip(names, groups, strict=True) if name in wanted for s in group]


def _from_folder(path: Path, rows: Numbers, count: int, field: str, tokenizer: Any) -> list[CreditSample]:
    if (path / FILE).is_file() and field == CREDIT:
        return _picked(read_credit_samples(path / FILE), rows, count, path / FILE)
    run = runs.read_run(path)
    files = [file for stage in run.credit_stages for file in sorted(stage.path.glob("*.parquet"))]
    if not files:
        raise RunError(_no_numbers(run, field))
    # train.parquet before eval.parquet
    file = max(files, key=lambda f: f.stem == "train")
    return _from_file(file, rows, count, field, tokenizer, {})


def _no_numbers(run: runs.Run, field: str) -> str:
    """Why a run has no such numbers of its rows' tokens."""
    if field != CREDIT:
        return f"{run.path} has no {field!r} of its rows' tokens: only an annotate stage stores such numbers"
    if run.status != "done":
        return f"no token rewards yet: {runs.unfinished_message(run)}"
    if any(stage.kind == "online" for stage in run.stages):
        return f"{run.path} has no recorded rollouts: rollout_samples says how many a run of {run.method} records"
    return (
        f"{run.path} has no token rewards to show: no annotate stage stored any, and there are no log-ratios of policy "
        "to reference either (the objective has no reference, or the rows were streamed)"
    )


def _spans_of_run(path: Path, rows: Numbers, count: int, tokenizer: Any, spans: Any) -> list[CreditSample]:
    """The spans of a run's training pairs: as annotated, or marked again as its recipe says."""
    run = runs.read_run(path)
    tokenizer = tokenizer if tokenizer is not None else _run_tokenizer(path)
    for stage in run.credit_stages:
        file = stage.path / "train.parquet"
        if spans is None and file.is_file() and SPANS in read_manifest(file)["columns"]:
            return _from_file(file, rows, count, SPANS, tokenizer, {})
    data = run.recipe.get("data") or {}
    settings = dict(data) if isinstance(data, Mapping) else {"train": data}
    for stage in (run.recipe.get("stages") or {}).values():
        own = stage.get("data")
        settings |= {k: v for k, v in own.items() if k == SPANS} if isinstance(own, Mapping) else {}
    if spans is not None:
        settings[SPANS] = spans
    message = f"{path}: its recipe marks no spans (data.spans); give a source with --spans, such as diff"
    require(settings.get(SPANS), RunError, message)
    with code_named_by(path / "recipe.yaml") if spans is None else nullcontext():
        return _from_file(settings["train"], rows, count, SPANS, tokenizer, settings)


def _run_tokenizer(folder: Path) -> Path | None:
    found = sorted(folder.glob("*/model/tokenizer_config.json"))
    return found[0].parent if found else None


def _from_file(
    path: Path | str, rows: Numbers, count: int, field: str, tokenizer: Any, settings: Row
) -> list[CreditSample]:
    """Rows of a file (or world); `settings`: how they become tokens, among other keys of a recipe's `data:`."""
    source, split = str(path), settings.get("split")
    data = load_rows(load_world(source).pairs("train")) if is_world(source) else load_rows(source, split=split)
    data = with_columns(data, settings["columns"]) if settings.get("columns") else data
    assert isinstance(data, StoredRows)  # not a stream
    total = len(data)
    numbers = list(range(min(count, total))) if rows is None else list(rows)
    for number in numbers:
        expected = f"0 to {total - 1}"
        require(0 <= number < total, DataError, "there is no such row", file=path, row=number, expected=expected)
    wanted = set(numbers)
    picked = {number: row for number, row in data if number in wanted}
    run = Path(source).absolute().parent.parent  # that the file may lie in
    if tokenizer is None and runs.is_run(run):
        tokenizer = _run_tokenizer(run)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_reader(ModelSpec(path=str(tokenizer)), str(tokenizer))
    return [_sample(data, number, picked[number], field, tokenizer, settings) for number in numbers]


def _sample(data: Any, number: int, row: Row, field: str, tokenizer: Any, settings: Row) -> CreditSample:
    file, place = data.place(number)
    columns = {role: column_name(role, field) for role in ROLES}
    roles = [role for role in ROLES if row.get(columns[role]) is not None]
    if len(roles) > 1:
        roles = [role for role in roles if role != "completion"]
    if field == SPANS and (settings.get(SPANS) or not roles):
        return _from_text(data, number, row, field, tokenizer, {SPANS: _likely_source(row), **settings})
    where: dict[str, Any] = {"file": file, "row": place}
    what = "the row has no token rewards" if field == CREDIT else f"the row has no {field!r} of its tokens"
    expected = f"{columns['chosen']!r} and {columns['rejected']!r}, or {columns['completion']!r}"
    require(roles, DataError, what, **where, value=sorted(map(str, row)), expected=expected)
    spans = any(isinstance(value, Mapping) for role in roles for value in row[columns[role]])
    if spans or any(row.get(f"{role}_ids") is None for role in roles):
        return _from_text(data, number, row, field, tokenizer, settings)
    _check_tokenizer(tokenizer, data.name)
    tokenizer = text_tokenizer(tokenizer)
    sides, size, ids = [], len(tokenizer), row.get("prompt_ids")
    highest, wrong = max(ids or (), default=-1), "this is not the tokenizer of the file"
    known = {"value": f"token id {highest}", "expected": f"ids below {size}, the tokenizer's size"}
    require(highest < size, DataError, wrong, **where, field="prompt_ids", **known)
    for role in roles:
        tokens, values = list(row[f"{role}_ids"]), list(row[columns[role]])
        _check_numbers(values, len(tokens), gaps=False, **where, field=columns[role])
        counted = row.get(f"{role}_counted")
        numbers = [v if counted is None or counted[i] else None for i, v in enumerate(values)]
        sides.append(Side(token_texts(tokenizer, tokens), numbers))
    pictures = pictures_in(row, file)
    text = prompt_text if pictures else lambda t, i: t.decode(i)
    prompt = text(tokenizer, list(ids)) if ids is not None else str(row.get("prompt", ""))
    return CreditSample(prompt, field, tuple(sides), number, pictures)


def pictures_in(row: Row, file: str) -> tuple[dict[str, Any], ...]:
    """The pictures of a row of this file, small; paths are relative to the file's folder."""
    try:
        return tuple(shown_pictures(row, folder=Path(file).parent if Path(file).is_file() else None))
    except RowError as error:
        raise DataError(error.what, file=file, field=error.field, value=error.value, expected=error.expected) from None


def _likely_source(row: Mapping[str, Any]) -> str:
    """Where the spans of a row probably come from, if nobody says so."""
    if row.get("chosen_spans") is not None:
        return "column"
    texts = repr((row.get("chosen"), row.get("rejected")))
    return "tags" if row.get("chosen_masked") is not None or SpanConfig().tags[0] in texts else "diff"


def _from_text(data: Any, number: int, row: Row, field: str, tokenizer: Any, settings: Row) -> CreditSample:
    """A row without token ids: tokenised here, as training would."""
    _check_tokenizer(tokenizer, data.name)
    prepare = prepare_pairs if row.get("rejected") is not None else prepare_sft
    names = {f.name for f in fields(TokenizeConfig)} - {"on_invalid"}
    config = TokenizeConfig(**{name: value for name, value in settings.items() if name in names})
    if config.span_config is not None:
        config = replace(config, spans=replace(config.span_config, on_none="keep"))
    position = next(i for i, (n, _) in enumerate(data) if n == number)
    sample = prepare(data.subset([position]), tokenizer, config).samples[0]
    sides, tokenizer = [], text_tokenizer(tokenizer)
    file, place = data.place(number)
    for completion in sample.completions[: len(SIDES)]:
        there = field in completion.columns
        require(there, DataError, "the row has no such values", file=file, row=place, field=field)
        values = iter(float(v) for v in completion.columns[field])
        counted = completion.counted or [True] * len(completion.ids)
        credit = [next(values) if keep else None for keep in counted]
        sides.append(Side(token_texts(tokenizer, completion.ids), credit))
    pictures = pictures_in(row, file)
    prompt = prompt_text(tokenizer, sample.prompt_ids) if pictures else tokenizer.decode(sample.prompt_ids)
    return CreditSample(prompt, field, tuple(sides), number, pictures)


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    message = f"{name}: a tokenizer is needed to show which words the tokens are, and this file does not lie in a run"
    require(tokenizer is not None, ModelError, f"{message} folder that has one; give it with --tokenizer PATH")


# `rollouts.jsonl` of an online stage has one line per completion; `tokengrain.training.rollout_log` says what is in it.
# Only `rollout`, `step` and `ids` must be there. A number per token that is null or NaN is shown as not counted.

CLIPPED = "clipped"
COLUMNS = (
    "advantages", "entropy", "ratio", "token_rewards", "weights", "thr", "old_logps", "ref_logps", "sampling_logps"
)  # fmt: skip
"""Numbers per token that can be shown; any may be missing."""
Values = list[float | None]


class View(NamedTuple):
    """How a column is shown: its name, what it is, and a constant that is taken off (so that colour is around 0)."""

    title: str
    note: str = ""
    shift: float = 0.0


VIEWS = {
    "advantages": View("token credit", "the advantage that the update used"),
    "entropy": View("entropy", "of the policy when the token was sampled, in nats"),
    "ratio": View("ratio − 1", "the token's probability over that when sampled, minus 1; at its last update", 1),
}
"""The heat maps of a report; other columns are shown under their own names, in the terminal."""


@dataclass(frozen=True)
class Recorded:
    """One completion."""

    rollout: int
    step: int  # optimiser steps before the rollout
    row: int | str | None  # of the prompt
    completion: int  # number within its group
    prompt: str
    tokens: list[str]
    reward: float | None  # the sum; None: it could not be scored
    rewards: Mapping[str, float | None]
    truncated: bool
    columns: Mapping[str, Values]  # those of `COLUMNS` that are there
    clipped: list[int] | None  # as in `Side`; None: not recorded


def read_rollouts(path: Path) -> list[Recorded]:
    """Read and check a `rollouts.jsonl`, if there is one, without a last line that a kill cut off."""
    if not path.exists():
        return []
    # Split at line ends only: `str.splitlines` would also cut at U+2028, which a completion may have in it.
    *lines, rest = regular_file(path).read_bytes().split(b"\n")
    found = []
    for number, line in enumerate([*lines, rest], start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            if number > len(lines):
                break
            raise RunError(f"{where} is damaged: {problem(error)}") from error
        found.append(_recorded(where, entry))
    return found


def _recorded(where: str, entry: Any) -> Recorded:
    message = f"{where} is no recorded completion, got {shown(entry)}; expected an object"
    require(isinstance(entry, dict), RunError, message)
    numeric = (int, float, type(None))

    def checked(name: str, value: Any, kinds: tuple[type, ...], expected: str) -> Any:
        right = type(value) in kinds  # the types of JSON; a bool is no number
        require(right, RunError, f"{where}: {name} is {shown(value)}; expected {expected}")
        return value

    def number(name: str, value: Any) -> float | None:
        checked(name, value, numeric, "a number")
        return None if value is None or math.isnan(value) else float(value)

    def listed(name: str, kinds: tuple[type, ...], words: str, length: int | None = None) -> list[Any]:
        values = entry.get(name)
        right = isinstance(values, list) and all(type(v) in kinds for v in values)
        require(right, RunError, f"{where}: {name} is {shown(values)}; expected a list of {words}")
        message = f"{where}: {name} has {len(values)} entries; expected {length}, one per token"
        require(length in (None, len(values)), RunError, message)
        return values

    def numbers(name: str) -> Values:
        return [number(name, value) for value in listed(name, numeric, "numbers", len(ids))]

    ids = listed("ids", (int,), "token ids")
    prompt = entry.get("prompt")
    if prompt is None and "prompt_ids" in entry:
        prompt = " ".join(map(str, listed("prompt_ids", (int,), "token ids")))
    rewards = checked("rewards", entry.get("rewards") or {}, (dict,), "an object of numbers by name")
    clipped = numbers(CLIPPED) if entry.get(CLIPPED) is not None else None
    return Recorded(
        rollout=checked("rollout", entry.get("rollout"), (int,), "a whole number"),
        step=checked("step", entry.get("step"), (int,), "a whole number"),
        row=checked("row", entry.get("row"), (int, str, type(None)), "a number or text"),
        completion=checked("completion", entry.get("completion", 0), (int,), "a whole number"),
        prompt="" if prompt is None else str(prompt),
        tokens=listed("tokens", (str,), "texts", len(ids)) if "tokens" in entry else [f" {i}" for i in ids],
        reward=number("reward", entry.get("reward")),
        rewards={str(name): number(f"rewards.{name}", value) for name, value in rewards.items()},
        truncated=bool(entry.get("truncated")),
        columns={n: numbers(n) for n in COLUMNS if entry.get(n) is not None},
        clipped=None if clipped is None else [(v is not None and v > 0) - (v is not None and v < 0) for v in clipped],
    )


def rollout_file(source: Path) -> Path | None:
    """The `rollouts.jsonl` that `source` is, or that the run in folder `source` has; of several the last stage's."""
    if source.name == ROLLOUT_FILE and source.is_file():
        return source
    if not runs.is_run(source):
        return None
    files = [s.path / ROLLOUT_FILE for s in runs.read_run(source).stages if s.kind == "online"]
    return next((file for file in reversed(files) if file.is_file()), None)


def by_prompt(completions: Iterable[Recorded]) -> list[list[Recorded]]:
    """Completions of the same rollout and prompt together, in the order of the file."""
    groups: dict[Any, list[Recorded]] = {}
    for one in completions:
        groups.setdefault((one.rollout, one.row, one.prompt), []).append(one)
    return list(groups.values())


def recorded_columns(completions: Sequence[Recorded]) -> list[str]:
    """Columns that at least one completion has, in the order of `COLUMNS`."""
    return [name for name in COLUMNS if any(name in one.columns for one in completions)]


def view_of(column: str) -> View:
    return VIEWS.get(column, View(column))


def side_of(one: Recorded, column: str, length: int | None = None) -> Side:
    """The first `length` tokens (None: all) as a heat map of one column; without numbers if it was not recorded."""
    shift = view_of(column).shift
    values = one.columns.get(column) or [None] * len(one.tokens)
    numbers = [None if v is None else v - shift for v in values]
    return Side(one.tokens[:length], numbers[:length], clipped=one.clipped and one.clipped[:length])


def scale_of(sides: Iterable[Side]) -> float:
    """The size that gets full colour; infinite numbers (a ratio that overflowed) have no say."""
    return colour_scale([v for side in sides for v in side.credit if v is not None and math.isfinite(v)])


def merged(side: Side) -> Side:
    """The same picture with fewer pieces: neighbours of the same number and mark are one."""
    marks = side.clipped if side.clipped is not None else [0] * len(side.tokens)
    tokens, values, kept = [], [], []
    for (value, mark), run in groupby(zip(side.credit, marks, side.tokens, strict=True), key=lambda item: item[:2]):
        tokens.append("".join(item[2] for item in run))
        values.append(value)
        kept.append(mark)
    return Side(tokens, values, clipped=kept if side.clipped is not None else None)


def spread(sizes: Sequence[int], most: int) -> list[int]:
    """Indices, evenly spread and the last one among them, of which the sizes add up to at most `most`; at least one."""
    count = len(sizes)
    picked = list(range(count))
    while count > 1 and (total := sum(sizes[i] for i in picked)) > most:
        count = max(1, min(count - 1, count * most // total))
        step = (len(sizes) - 1) / max(count - 1, 1)
        picked = [round(len(sizes) - 1 - i * step) for i in reversed(range(count))]
    return picked
