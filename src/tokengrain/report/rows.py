"""Reading token rewards or spans for looking at: from any file of rows that has them, or from a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tokengrain import runs
from tokengrain.errors import DataError, ModelError, RunError
from tokengrain.report.samples import FILE, CreditSample, Side, by_pair, read_credit_samples, token_texts

ROLES = ("chosen", "rejected", "completion")
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
            `rejected_token_rewards` or `token_rewards`; a `credit_samples.json`; or the folder of a run or
            demo.
        rows: row numbers, counted from 0; None: the first `count` rows.
        count: how many rows if `rows` is None.
        field: which per-token quantity, for example "ref_logps" or "spans".
        tokenizer: tokenizer, or its path or name; needed where the file does not lie in a run folder.
        spans: with `field` "spans": mark them anew, from this source (a `SpanConfig`, a mapping of its fields, or
            "diff", "tags", ...). Default: those that are stored, else the run's source, else what the columns of
            the row suggest, else the diff.

    Raises:
        DataError: no such column or row; or a row whose numbers do not fit its tokens (names file, row,
            field).
        ModelError: a tokenizer is needed.
        RunError: a run folder without token rewards.
    """
    path = Path(source)
    if path.is_dir() and field == SPANS:
        return _spans_of_run(path, rows, count, tokenizer, spans)
    if path.is_dir():
        return _from_folder(path, rows, count, field, tokenizer)
    if path.name == FILE:
        if field != CREDIT:
            raise DataError("there are only token rewards", file=path, value=field, expected=CREDIT)
        return _picked(read_credit_samples(path), rows, count, path)
    settings = {} if spans is None else {"spans": spans}
    near = tokenizer if tokenizer is not None else _near_tokenizer(path)
    return _from_file(path, rows, count, field, near, settings)


def _picked(samples: Sequence[CreditSample], rows: Sequence[int] | None, count: int, path: Path) -> list[CreditSample]:
    """Samples of the wanted rows; a pair seen by several sources is one row."""
    groups = by_pair(samples)
    names = [g[0].row if g[0].row is not None else i for i, g in enumerate(groups)]
    wanted = names[:count] if rows is None else list(rows)
    for row in wanted:
        if row not in names:
            raise DataError("there is no such row", file=path, row=row, expected=f"one of {names[:20]}")
    return [s for name, group in zip(names, groups, strict=True) if name in wanted for s in group]


# ------------------------------------------------------------------------------------------------ run folders


def _from_folder(path: Path, rows: Sequence[int] | None, count: int, field: str, tokenizer: Any) -> list[CreditSample]:
    if (path / FILE).is_file() and field == CREDIT:
        return _picked(read_credit_samples(path / FILE), rows, count, path / FILE)
    run = runs.read_run(path)
    files = [file for stage in run.credit_stages for file in sorted(stage.path.glob("*.parquet"))]
    if not files:
        if field != CREDIT:
            raise RunError(f"{path} has no {field!r} of its rows' tokens: only an annotate stage stores such numbers")
        if run.status != "done":
            raise RunError(f"no token rewards yet: {runs.unfinished_message(run)}")
        if any(stage.kind == "online" for stage in run.stages):
            raise RunError(
                f"{path} has no recorded rollouts: rollout_samples says how many a run of {run.method} records"
            )
        raise RunError(
            f"{path} has no token rewards to show: no annotate stage stored any, and there are no log-ratios of policy "
            "to reference either (the objective has no reference, or the rows were streamed)"
        )
    # train.parquet before eval.parquet
    file = max(files, key=lambda f: f.stem == "train")
    return _from_file(file, rows, count, field, tokenizer if tokenizer is not None else _near_tokenizer(file))


def _spans_of_run(path: Path, rows: Sequence[int] | None, count: int, tokenizer: Any, spans: Any) -> list[CreditSample]:
    """The spans of a run's training pairs: as annotated, or marked again as its recipe says."""
    from tokengrain.credit.manifest import read_manifest

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
    if not settings.get(SPANS):
        raise RunError(f"{path}: its recipe marks no spans (data.spans); give a source with --spans, such as diff")
    return _from_file(settings["train"], rows, count, SPANS, tokenizer, settings)


def _near_tokenizer(path: Path) -> Path | None:
    """Folder of the tokenizer of the run that `path` lies in."""
    folder = path.absolute().parent.parent
    return _run_tokenizer(folder) if runs.is_run(folder) else None


def _run_tokenizer(folder: Path) -> Path | None:
    found = sorted(folder.glob("*/model/tokenizer_config.json"))
    return found[0].parent if found else None


# ------------------------------------------------------------------------------------------------------ files


def _from_file(
    path: Path | str,
    rows: Sequence[int] | None,
    count: int,
    field: str,
    tokenizer: Any,
    settings: Mapping[str, Any] | None = None,
) -> list[CreditSample]:
    """Rows of a file (or world); `settings`: how they become tokens, among other keys of a recipe's `data:`."""
    from tokengrain.data import load_rows
    from tokengrain.data.columns import with_columns
    from tokengrain.data.rows import StoredRows
    from tokengrain.worlds import is_world, load_world

    source, settings = str(path), settings or {}
    split = settings.get("split")
    data = load_rows(load_world(source).pairs("train")) if is_world(source) else load_rows(source, split=split)
    data = with_columns(data, settings["columns"]) if settings.get("columns") else data
    assert isinstance(data, StoredRows)  # not a stream
    total = len(data)
    numbers = list(range(min(count, total))) if rows is None else list(rows)
    for number in numbers:
        if not 0 <= number < total:
            raise DataError("there is no such row", file=path, row=number, expected=f"0 to {total - 1}")
    picked = {number: row for number, row in data if number in set(numbers)}
    loaded = _load_tokenizer(tokenizer)
    return [_sample(data, number, picked[number], field, loaded, settings) for number in numbers]


def _load_tokenizer(tokenizer: Any) -> Any:
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer could be loaded from {tokenizer}: {error}") from error


def _sample(
    data: Any, number: int, row: Mapping[str, Any], field: str, tokenizer: Any, settings: Mapping[str, Any]
) -> CreditSample:
    from tokengrain.credit.manifest import column_name

    file, place = data.place(number)
    columns = {role: column_name(role, field) for role in ROLES}
    roles = [role for role in ROLES if row.get(columns[role]) is not None]
    if len(roles) > 1:
        roles = [role for role in roles if role != "completion"]
    if field == SPANS and (settings.get(SPANS) or not roles):
        return _from_text(data, number, row, field, tokenizer, {SPANS: _likely_source(row), **settings})
    if not roles:
        raise DataError(
            "the row has no token rewards" if field == CREDIT else f"the row has no {field!r} of its tokens",
            file=file,
            row=place,
            value=sorted(map(str, row)),
            expected=f"{columns['chosen']!r} and {columns['rejected']!r}, or {columns['completion']!r}",
        )
    ids = {role: row.get(f"{role}_ids") for role in roles}
    spans = any(isinstance(value, Mapping) for role in roles for value in row[columns[role]])
    if spans or any(value is None for value in ids.values()):
        return _from_text(data, number, row, field, tokenizer, settings)
    if tokenizer is None:
        raise _tokenizer_needed(data.name)
    sides = []
    for role in roles:
        tokens, values = list(ids[role] or []), list(row[columns[role]])
        _check_length(file, place, columns[role], values, tokens)
        counted = row.get(f"{role}_counted")
        numbers = [v if counted is None or counted[i] else None for i, v in enumerate(values)]
        sides.append(Side(_texts(tokenizer, tokens, file, place, f"{role}_ids"), numbers))
    return CreditSample(_prompt_text(row, tokenizer), field, tuple(sides), number)


def _likely_source(row: Mapping[str, Any]) -> str:
    """Where the spans of a row probably come from, if nobody says so."""
    if row.get("chosen_spans") is not None:
        return "column"
    from tokengrain.data import SpanConfig

    texts = repr((row.get("chosen"), row.get("rejected")))
    return "tags" if row.get("chosen_masked") is not None or SpanConfig().tags[0] in texts else "diff"


def _from_text(
    data: Any, number: int, row: Mapping[str, Any], field: str, tokenizer: Any, settings: Mapping[str, Any]
) -> CreditSample:
    """A row without token ids: tokenised here, as training would."""
    if tokenizer is None:
        raise _tokenizer_needed(data.name)
    from tokengrain.data import TokenizeConfig, prepare_pairs, prepare_sft

    prepare = prepare_pairs if row.get("rejected") is not None else prepare_sft
    names = {f.name for f in fields(TokenizeConfig)} - {"on_invalid"}
    config = TokenizeConfig(**{name: value for name, value in settings.items() if name in names})
    if config.span_config is not None:
        config = replace(config, spans=replace(config.span_config, on_none="keep"))
    sample = prepare(data.subset([_position(data, number)]), tokenizer, config).samples[0]
    sides = []
    for completion in sample.completions:
        if field not in completion.columns:
            file, place = data.place(number)
            raise DataError("the row has no such values", file=file, row=place, field=field)
        values = iter(float(v) for v in completion.columns[field])
        counted = completion.counted or [True] * len(completion.ids)
        credit = [next(values) if keep else None for keep in counted]
        sides.append(Side(token_texts(tokenizer, completion.ids), credit))
    return CreditSample(tokenizer.decode(sample.prompt_ids), field, tuple(sides), number)


def _position(data: Any, number: int) -> int:
    return next(i for i, (n, _) in enumerate(data) if n == number)


def _tokenizer_needed(name: str) -> ModelError:
    return ModelError(
        f"{name}: a tokenizer is needed to show which words the tokens are, and this file does not lie in "
        "a run folder that has one; give it with --tokenizer PATH"
    )


def _check_length(file: str, row: str, field: str, values: Sequence[Any], tokens: Sequence[int]) -> None:
    if len(values) != len(tokens):
        raise DataError(
            "the token rewards do not fit the tokens",
            file=file,
            row=row,
            field=field,
            value=f"{len(values)} numbers",
            expected=f"{len(tokens)}, one per token",
        )
    for i, value in enumerate(values):
        if not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
            raise DataError(
                f"token {i} has no finite number",
                file=file,
                row=row,
                field=field,
                value=value,
                expected="a number",
            )


def _texts(tokenizer: Any, ids: Sequence[int], file: str, row: str, field: str) -> list[str]:
    if ids and max(ids) >= len(tokenizer):
        raise DataError(
            "this is not the tokenizer of the file",
            file=file,
            row=row,
            field=field,
            value=f"token id {max(ids)}",
            expected=f"ids below {len(tokenizer)}, the tokenizer's size",
        )
    return token_texts(tokenizer, ids)


def _prompt_text(row: Mapping[str, Any], tokenizer: Any) -> str:
    ids = row.get("prompt_ids")
    return tokenizer.decode(list(ids)) if ids is not None else str(row.get("prompt", ""))
