"""Recorded rollouts: the completions that online training wrote down, with the numbers of every token.

`rollouts.jsonl` in the folder of an online stage has one line per completion; `tokengrain.training.online.record`
says what is in it. Only `rollout`, `step` and `ids` must be there. Without `tokens` the ids are shown. A number per
token that is null or NaN is shown as not counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from tokengrain import runs
from tokengrain.errors import RunError, shown
from tokengrain.report.samples import Side, colour_scale

ROLLOUT_FILE = "rollouts.jsonl"
CLIPPED = "clipped"
COLUMNS = (
    "advantages",
    "entropy",
    "ratio",
    "token_rewards",
    "weights",
    "thr",
    "old_logps",
    "ref_logps",
    "sampling_logps",
)
"""Numbers per token that can be shown; any may be missing."""

Values = list[float | None]


@dataclass(frozen=True)
class View:
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
    """One completion.

    Attributes:
        rollout: number of the rollout; step: optimiser steps before it.
        row: of the prompt; completion: number within its group.
        prompt: as text; tokens: text of each token.
        reward: the sum; None: it could not be scored. rewards: by name.
        truncated: it did not end by itself.
        columns: name to one number per token, of those in `COLUMNS` that are there.
        clipped: -1, 0 or 1 per token: its ratio was clipped below, not clipped, clipped above; None: not recorded.
    """

    rollout: int
    step: int
    row: int | str | None
    completion: int
    prompt: str
    tokens: list[str]
    reward: float | None = None
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    truncated: bool = False
    columns: Mapping[str, Values] = field(default_factory=dict)
    clipped: list[int] | None = None


# ------------------------------------------------------------------------------------------------------ reading


def read_rollouts(path: Path) -> list[Recorded]:
    """Read and check a `rollouts.jsonl`; an absent file is an empty list.

    A last line without an end, which a kill leaves behind, is left out.

    Raises:
        RunError: a damaged line; names file, line (from 1) and field.
    """
    if not path.exists():
        return []
    # Split at line ends only: `str.splitlines` would also cut at U+2028, which a completion may have in it.
    *lines, rest = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate([*lines, rest], start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            if number > len(lines):
                break
            raise RunError(f"{where} is damaged: {error}") from error
        found.append(_parse(where, entry))
    return found


def _parse(where: str, entry: Any) -> Recorded:
    if not isinstance(entry, dict):
        raise RunError(f"{where} is no recorded completion, got {shown(entry)}; expected an object")
    ids = _list_of(where, entry, "ids", (int,))
    tokens = _list_of(where, entry, "tokens", (str,), len(ids)) if "tokens" in entry else [f" {i}" for i in ids]
    prompt = entry.get("prompt")
    if prompt is None:
        prompt = " ".join(map(str, _list_of(where, entry, "prompt_ids", (int,)))) if "prompt_ids" in entry else ""
    row = entry.get("row")
    if row is not None and not isinstance(row, int | str):
        raise RunError(f"{where}: row is {shown(row)}; expected a number or text")
    rewards = entry.get("rewards") or {}
    if not isinstance(rewards, dict):
        raise RunError(f"{where}: rewards is {shown(rewards)}; expected an object of numbers by name")
    clipped = entry.get(CLIPPED)
    if clipped is not None:
        clipped = [_sign(v) for v in _numbers(where, entry, CLIPPED, len(ids))]
    return Recorded(
        rollout=_whole(where, entry, "rollout"),
        step=_whole(where, entry, "step"),
        row=row,
        completion=_whole(where, entry, "completion", 0),
        prompt=str(prompt),
        tokens=tokens,
        reward=_number(where, "reward", entry.get("reward")),
        rewards={str(name): _number(where, f"rewards.{name}", value) for name, value in rewards.items()},
        truncated=bool(entry.get("truncated")),
        columns={n: _numbers(where, entry, n, len(ids)) for n in COLUMNS if entry.get(n) is not None},
        clipped=clipped,
    )


def _whole(where: str, entry: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = entry.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise RunError(f"{where}: {name} is {shown(value)}; expected a whole number")
    return value


def _number(where: str, name: str, value: Any) -> float | None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise RunError(f"{where}: {name} is {shown(value)}; expected a number")
    return None if value is None or math.isnan(value) else float(value)


def _list_of(
    where: str, entry: Mapping[str, Any], name: str, kinds: tuple[type, ...], length: int | None = None
) -> list[Any]:
    values = entry.get(name)
    words = "numbers" if float in kinds else "texts" if str in kinds else "token ids"
    if not isinstance(values, list) or not all(isinstance(v, kinds) for v in values):
        raise RunError(f"{where}: {name} is {shown(values)}; expected a list of {words}")
    if length is not None and len(values) != length:
        raise RunError(f"{where}: {name} has {len(values)} entries; expected {length}, one per token")
    return values


def _numbers(where: str, entry: Mapping[str, Any], name: str, length: int) -> Values:
    values = _list_of(where, entry, name, (int, float, type(None)), length)
    return [None if v is None or math.isnan(v) else float(v) for v in values]


def _sign(value: float | None) -> int:
    return 0 if not value else 1 if value > 0 else -1


def rollout_file(source: Path) -> Path | None:
    """The `rollouts.jsonl` that `source` is, or that the run in folder `source` has; of several the last stage's.

    Raises:
        RunError: a damaged run folder.
    """
    if source.name == ROLLOUT_FILE and source.is_file():
        return source
    if not runs.is_run(source):
        return None
    files = [s.path / ROLLOUT_FILE for s in runs.read_run(source).stages if s.kind == "online"]
    return next((file for file in reversed(files) if file.is_file()), None)


# ------------------------------------------------------------------------------------------------------ showing


def by_prompt(completions: Iterable[Recorded]) -> list[list[Recorded]]:
    """Completions of the same rollout and prompt together, in the order of the file."""
    groups: dict[Any, list[Recorded]] = {}
    for one in completions:
        groups.setdefault((one.rollout, one.row, one.prompt), []).append(one)
    return list(groups.values())


def recorded_columns(completions: Iterable[Recorded]) -> list[str]:
    """Columns that at least one completion has, in the order of `COLUMNS`."""
    there = {name for one in completions for name in one.columns}
    return [name for name in COLUMNS if name in there]


def view_of(column: str) -> View:
    return VIEWS.get(column, View(column))


def side_of(one: Recorded, column: str) -> Side:
    """A completion as a heat map of one column; tokens without a number where it was not recorded."""
    shift = view_of(column).shift
    values = one.columns.get(column) or [None] * len(one.tokens)
    return Side(one.tokens, [None if v is None else v - shift for v in values], clipped=one.clipped)


def scale_of(sides: Iterable[Side]) -> float:
    """The size that gets full colour; infinite numbers (a ratio that overflowed) have no say."""
    return colour_scale([v for side in sides for v in side.credit if v is not None and math.isfinite(v)])


def cut(side: Side, length: int) -> Side:
    """The first `length` tokens."""
    return Side(side.tokens[:length], side.credit[:length], clipped=side.clipped and side.clipped[:length])


def merged(side: Side) -> Side:
    """The same picture with fewer pieces: neighbours of the same number and mark are one.

    The credit of a group-relative method is one number per completion; a piece per token would repeat it for each.
    """
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
