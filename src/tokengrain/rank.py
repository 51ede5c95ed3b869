"""`tokengrain rank`: score the completions of a file's rows and say which is best."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from tokengrain import models
from tokengrain.annotation import CPU_TOKENS, GPU_TOKENS
from tokengrain.batch import Sample, TokenBatch, first_fit
from tokengrain.data.config import BATCH_ROWS, RowError, TokenizeConfig, check
from tokengrain.data.encode import Encoded, ExampleEncoder
from tokengrain.data.formats import (
    Example,
    Given,
    canonical,
    check_prompt,
    content,
    for_template,
    pair_example,
    pictured,
)
from tokengrain.data.rows import file_kind, load_rows
from tokengrain.errors import DataError, ModelError, RecipeError, atomic_write, check_output, json_line, require
from tokengrain.evaluation import statistics
from tokengrain.evaluation.statistics import Estimate, LengthBucket, Pooling, score_completions
from tokengrain.scoring.model import positions_of
from tokengrain.screen import progress_bar
from tokengrain.specs import ModelSpec

logger = logging.getLogger(__name__)


@dataclass
class Ranking:
    """What `rank` did: the file and how many rows it has."""

    output: Path
    rows: int = 0
    skipped: int = 0  # invalid rows (`on_invalid: skip`)
    pairs: int = 0  # rows that were preference pairs
    accuracy: Estimate | None = None  # share of the pairs whose chosen completion scores higher; a tie counts half
    by_length: list[LengthBucket] = field(default_factory=list)  # by length of chosen minus rejected, in tokens


def rank(
    file: Any,
    model: str | os.PathLike[str] | nn.Module | Callable[..., Any],
    *,
    output: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    tokenize: TokenizeConfig | None = None,
    pooling: Pooling = "mean",
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Ranking:
    """Write a file's rows with `scores`, one per completion, and `best`, the number of the best from 0.

    A row has `prompt` and `completions` (a list), or is a preference pair, whose completions are chosen and
    rejected. A completion's score is the mean over its tokens, so it depends neither on the other completions nor on
    the batch.

    Args:
        file: anything `tokengrain.data.load_rows` takes; files are read row by row.
        model: a reward model's folder or hub name, a loaded reward model, or a credit source (for example
            `guide`: the reward that a DPO-trained model implies).
        output: a .jsonl file; default: the input's name with `.ranked.jsonl`, in the working directory.
        tokenizer: needed with a loaded model or a credit source; a processor where rows have pictures.
        tokenize: how rows become tokens; `on_invalid: skip` leaves out rows that cannot be used.
        pooling: "last" for a reward model trained on the last token alone.
        max_tokens: token budget of one forward pass (default 8,192 on CPU, 32,768 on GPU).
        device: default: CUDA if there is one; a loaded model or credit source stays where it is.
        overwrite: replace an output that exists.
        progress: show a progress bar on a terminal.

    Raises:
        DataError: a row without prompt or completions, or of wrong types; names the row and the field.
        ModelError: no such reward model.
        RecipeError, RunError: a setting that is missing or unknown; an output that exists or cannot be written.
    """
    known = get_args(Pooling)
    require(pooling in known, RecipeError, f"pooling is {pooling!r}; expected one of {', '.join(known)}")
    rows = load_rows(file, streaming=True)
    result = Ranking(_target(file, rows.name, output, overwrite))
    tokenize = tokenize or TokenizeConfig()
    source, tokenizer, device, positions = _scorer(model, tokenizer, device)
    encoder = ExampleEncoder(tokenizer, tokenize, lambda example: example, positions, place=rows.place)
    budget = max_tokens or (GPU_TOKENS if torch.device(device).type == "cuda" else CPU_TOKENS)
    scores: list[float] = []
    lengths: list[int] = []
    quiet = not progress or not sys.stderr.isatty()
    with (
        atomic_write(result.output) as temporary,
        open(temporary, "w", encoding="utf-8") as stream,
        progress_bar(f"ranking {rows.name}", quiet=quiet) as update,
    ):
        source_rows, replaced = iter(rows), set[str]()
        while group := list(islice(source_rows, BATCH_ROWS)):
            ready = _candidates(group, encoder, rows, tokenize, result)
            found = _scored([c for _, _, c in ready], source, pooling, budget, device)
            for (number, row, candidates), values in zip(ready, found, strict=True):
                if not all(map(math.isfinite, values)):
                    at, line = rows.place(number)
                    raise DataError("a score is not finite", file=at, row=line, value=values, expected="finite numbers")
                made = {"scores": values, "best": values.index(max(values))}
                if new := made.keys() & row.keys() - replaced:
                    what = "%s: rows have a column %s, which %s has anew; rename it to keep it"
                    logger.warning(what, rows.name, " and ".join(sorted(new)), result.output)
                    replaced |= new
                ranked = {**row, **made}
                stream.write(json_line(ranked))
                if "chosen" in row and "completions" not in row:
                    counted = [c.completions[0].n_counted for c in candidates]
                    for i in range(1, len(values)):  # of several rejected completions each makes a pair
                        scores += [values[0], values[i]]
                        lengths += [counted[0], counted[i]]
            result.rows += len(ready)
            update(advance=len(group))
        skipped = f"{result.skipped} rows skipped"
        require(result.rows, DataError, "no row could be used", file=rows.name, value=skipped)
    if scores:
        by_pair = torch.tensor(scores, dtype=torch.float64)
        chosen, rejected = by_pair[0::2], by_pair[1::2]
        wins = float((chosen > rejected).sum()) + 0.5 * float((chosen == rejected).sum())
        result.pairs, result.accuracy = len(chosen), statistics.wilson(wins, len(chosen))
        result.by_length = statistics.accuracy_by_length(by_pair, torch.tensor(lengths))
    return result


def candidates_of(row: Any, chat: bool = False) -> list[Example]:
    """One example per completion of a row. Raises `RowError`."""
    row = canonical(row, chat)
    if "completions" not in row:
        expected = "prompt + completions (a list), or a preference pair"
        what = "the row has no completions"
        check("chosen" in row, "missing column", what, field="completions", value=list(row), expected=expected)
        pair = pair_example(row)
        return [_single(row, pair.prompt, pair.pictures, c, name) for c, name in zip(pair.completions, pair.fields)]
    prompt, several = content(row, "prompt"), row["completions"]
    check_prompt(prompt)
    whole = isinstance(several, Sequence) and not isinstance(several, (str, bytes)) and len(several)
    expected = "a list of at least one string or list of messages"
    check(whole, "wrong type", "is not a list of completions", field="completions", value=several, expected=expected)
    prompt, pictures = pictured(row, prompt)
    examples = []
    for index, value in enumerate(several):
        name = f"completions[{index}]"
        completion = content({name: value}, name)
        expected = "prompt and completions all strings or all lists of messages"
        alike = isinstance(completion, str) == isinstance(prompt, str)
        check(alike, "mixed types", "is not of the prompt's kind", field=name, value=value, expected=expected)
        examples.append(_single(row, prompt, pictures, completion, name))
    return examples


def _single(row: Any, prompt: Any, pictures: Mapping[str, Given], completion: Any, name: str) -> Example:
    return Example(prompt, (completion,), (name,), ({},), ("",), **for_template(row), pictures=pictures)


def _scorer(model: Any, tokenizer: Any, device: Any) -> tuple[Any, Any, Any, int | None]:
    """`(reward model or credit source, tokenizer, device, positions)`."""
    if isinstance(model, (str, os.PathLike)):
        path = os.path.expanduser(os.fspath(model))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded: Any = models.load_trained_reward_model(path).to(device)
        tokenizer = tokenizer or models.load_reader(ModelSpec(path=path), path)
        return loaded, tokenizer, device, positions_of(loaded.config)
    missing = "tokenizer is missing; it is needed with a model or credit source that is loaded already"
    require(tokenizer is not None, RecipeError, missing)
    if isinstance(model, nn.Module):
        config: Any = getattr(model, "config", None)
        positions = positions_of(config) if config is not None else None
        return model, tokenizer, device or next(model.parameters()).device, positions
    kind = type(model).__name__
    require(callable(model), ModelError, f"model is {kind}; expected a path, a reward model or a credit source")
    return model, tokenizer, device or "cpu", None


def _target(file: Any, name: str, output: Any, overwrite: bool) -> Path:
    named = isinstance(file, (str, os.PathLike))
    missing = "output is missing; it is needed where the rows do not come from a file"
    require(output is not None or named, RecipeError, missing)
    stem = Path(name.removesuffix(".gz")).stem if file_kind(Path(name)) else Path(name).name
    target = Path(output) if output is not None else Path(f"{stem}.ranked.jsonl")
    jsonl = target.suffix == ".jsonl"
    require(jsonl, RecipeError, f"output is {str(target)!r}; expected a name that ends in .jsonl")
    return check_output(target, file, overwrite)


Ready = tuple[int, Mapping[str, Any], list[Sample]]  # number, row, one sample per completion


def _candidates(
    group: Sequence[tuple[int, Any]], encoder: ExampleEncoder, rows: Any, tokenize: TokenizeConfig, result: Ranking
) -> list[Ready]:
    """Every row that can be used; one that cannot raises, unless such rows are to be skipped."""
    examples: list[tuple[int, Any, list[Example]]] = []
    errors: list[tuple[int, RowError]] = []
    for number, row in group:
        try:
            examples.append((number, row, candidates_of(row, tokenize.chat)))
        except RowError as error:
            errors.append((number, error))
    encoded = iter(encoder([(number, e) for number, _, several in examples for e in several]))
    ready: list[Ready] = []
    for number, row, several in examples:
        found = list(islice(encoded, len(several)))
        bad = [(number, e) for e in found if isinstance(e, RowError)]
        errors += bad[:1]
        if not bad:
            ready.append((number, row, [e.sample for e in found if isinstance(e, Encoded)]))
    if errors and tokenize.on_invalid == "error":
        number, first = min(errors, key=lambda e: e[0])
        raise first.located(*rows.place(number)) from first
    result.skipped += len(errors)
    return ready


def _scored(rows: Sequence[list[Sample]], source: Any, pooling: Pooling, budget: int, device: Any) -> list[list[float]]:
    """The score of every completion, micro-batch by micro-batch; completions with one prompt share it."""
    units = [_merged(row) for row in rows]
    samples = [sample for unit in units for sample in unit]
    values: list[list[float]] = [[] for _ in samples]
    for chosen in first_fit([s.n_tokens for s in samples], budget):
        batch = TokenBatch.from_samples([samples[i] for i in chosen]).to(device)
        scores = score_completions(source, batch, pooling).double().cpu()
        for place, score in zip(batch.group.tolist(), scores.tolist(), strict=True):
            values[chosen[place]].append(score)
    parts = iter(values)
    return [[score for _ in unit for score in next(parts)] for unit in units]


def _merged(samples: Sequence[Sample]) -> list[Sample]:
    """One sample if the prompt's tokens are the same before every completion, as they nearly always are."""
    first = samples[0]
    if any(s.prompt_ids != first.prompt_ids for s in samples):
        return list(samples)
    raw = {"prompt": first.raw["prompt"]} if "prompt" in first.raw else {}
    return [first.again([c for s in samples for c in s.completions], raw=raw)]
