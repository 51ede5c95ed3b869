"""`tokengrain generate`: a model's answers to prompts, also as AlpacaEval, Arena-Hard and MT-Bench read them."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from tokengrain import models
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.formats import stored_row
from tokengrain.data.pictures import KINDS, as_json
from tokengrain.data.rows import load_rows
from tokengrain.data.tokens import text_tokenizer
from tokengrain.data.vision import folder_of
from tokengrain.errors import (
    DataError,
    ModelError,
    RecipeError,
    RunError,
    check_output,
    fingerprint,
    json_line,
    read_log,
    require,
    write_text,
)
from tokengrain.rollout.local import answering
from tokengrain.rollout.sampler import SamplingConfig, encode_prompts
from tokengrain.runs import is_run, read_run
from tokengrain.scoring.prepare import prompt_role
from tokengrain.screen import progress_bar
from tokengrain.specs import ModelSpec

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
PICTURES = [name for kind in KINDS for name in (kind, f"{kind}s")]
"""Columns of a row that go with its prompt."""

Dtype = Literal["float32", "bfloat16", "float16", "auto"]

MT_BENCH_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
MT_BENCH_TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
"""By category, as FastChat's `llm_judge` draws answers; 0.7 for others."""


class Format(NamedTuple):
    """How a benchmark writes its questions and reads its answers."""

    columns: frozenset[str]  # that a question has
    suffixes: tuple[str, ...]  # of the file with answers
    turns: Callable[[Row], Any]  # what the user says, turn by turn
    answer: Callable[[Row, list[list[str]], str], dict[str, Any]]  # row, text by sample and turn, the model's name
    benchmark: bool = True
    temperature: Callable[[Row], float] = lambda row: 0.0


def _alpaca_turns(row: Row) -> list[str]:
    return [f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]]


def _alpaca_answer(row: Row, texts: list[list[str]], name: str) -> dict[str, Any]:
    kept = {key: row[key] for key in ("dataset", "instruction", "input") if key in row}
    return {**kept, "output": texts[0][0], "generator": name}


def _arena_answer(row: Row, texts: list[list[str]], name: str) -> dict[str, Any]:
    said = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": {"answer": texts[0][0]}}]
    mark = fingerprint([row["uid"], name, texts[0][0]])
    return {"uid": row["uid"], "ans_id": mark, "model": name, "messages": said, "tstamp": time.time()}


def _mt_answer(row: Row, texts: list[list[str]], name: str) -> dict[str, Any]:
    choices = [{"index": index, "turns": turns} for index, turns in enumerate(texts)]
    mark = fingerprint([row["question_id"], name, texts])
    ids = {"question_id": row["question_id"], "answer_id": mark, "model_id": name}
    return {**ids, "choices": choices, "tstamp": time.time()}


def _row_answer(row: Row, texts: list[list[str]], name: str) -> dict[str, Any]:
    said = [turns[0] for turns in texts]
    return {**row, **({"completion": said[0]} if len(said) == 1 else {"completions": said})}


FORMATS = {
    "mt_bench": Format(
        frozenset({"question_id", "turns"}),
        (".jsonl",),
        lambda row: row["turns"],
        _mt_answer,
        temperature=lambda row: MT_BENCH_TEMPERATURES.get(str(row.get("category")), 0.7),
    ),
    "arena_hard": Format(frozenset({"uid", "prompt"}), (".jsonl",), lambda row: [row["prompt"]], _arena_answer),
    "alpaca_eval": Format(frozenset({"instruction"}), (".json",), _alpaca_turns, _alpaca_answer),
    "rows": Format(
        frozenset({"prompt"}), (".json", ".jsonl"), lambda row: [row["prompt"]], _row_answer, benchmark=False
    ),
}
"""In the order in which they are recognised by the columns of the first row."""


@dataclass
class Generation:
    """What `generate` did: the file, its rows, and how many of them an earlier, interrupted call had answered."""

    output: Path
    rows: int
    resumed: int = 0


def generate(
    model: str | os.PathLike[str],
    prompts: Any,
    output: str | os.PathLike[str],
    *,
    format: str | None = None,
    chat: bool | None = None,
    system: str | None = None,
    name: str | None = None,
    samples: int = 1,
    temperature: float | None = None,
    top_p: float = 1.0,
    max_new_tokens: int = 1024,
    seed: int = 0,
    limit: int | None = None,
    dtype: Dtype = "auto",
    batch_rows: int = 64,
    overwrite: bool = False,
) -> Generation:
    """Answer every prompt of a file, and write the answers at once when all are there.

    What is done is kept beside the output (`OUTPUT.part`), so that after a stop the same call resumes, to the same
    answers: they depend on the seed and the row, not on the batch.

    Args:
        model: folder, adapter folder, hub name, or the folder of a finished run.
        prompts: anything `load_rows` takes. Rows with `prompt` (text or messages), or the questions of AlpacaEval
            (`instruction`), Arena-Hard (`uid`, `prompt`) or MT-Bench (`question_id`, `turns`).
        output: .json (an array) or .jsonl. Rows keep their columns and get `completion`, or `completions` if there are
            several samples; a benchmark's answers are as its own tools read them.
        format: "rows", "alpaca_eval", "arena_hard" or "mt_bench"; None: by the columns of the first row.
        chat: put text into the model's chat template; None: for a benchmark if the model has one. Messages always are.
        system: a system message before the user's.
        name: of the model in a benchmark's answers; None: the last part of its path, or the folder of the run.
        samples: answers per prompt (benchmarks but MT-Bench take one).
        temperature: 0 takes the most probable tokens. None: 0, and for MT-Bench what its authors take per category.
        top_p, max_new_tokens, seed: see `SamplingConfig`.
        limit: answer only the first rows.
        dtype: of the weights; "auto": as they are saved.
        batch_rows: rows that are answered, and kept, at a time.
        overwrite: replace an output, and the part of one with other settings.

    Raises:
        DataError: a row that is no prompt. ModelError, RolloutError: a model or prompt that does not fit.
        RecipeError, RunError: a setting that does not fit; an output that exists.
    """
    require(limit is None or limit >= 1, RecipeError, f"limit is {limit}; expected at least 1")
    model = os.fspath(model)
    path = str(read_run(model).model_path) if is_run(model) else os.path.expanduser(model)
    label = name or Path(model).name
    folder = folder_of(prompts, TokenizeConfig())
    read = (row for _, row in islice(iter(load_rows(prompts)), limit))
    rows = [stored_row(row, folder) if isinstance(row, Mapping) else row for row in read]
    form = _format(format, rows, str(prompts))
    target, part = _target(prompts, output, form, overwrite), Path(f"{output}.part")
    one = form.benchmark and form is not FORMATS["mt_bench"]
    require(samples >= 1 and not (one and samples > 1), RecipeError, f"samples is {samples}; expected 1")
    require(batch_rows >= 1, RecipeError, f"batch_rows is {batch_rows}; expected at least 1")
    replaced = "completion" if samples == 1 else "completions"
    if not form.benchmark and any(replaced in row for row in rows):
        what = "%s: rows have a column %r, in place of which %s has the answers; rename it to keep it"
        logger.warning(what, prompts, replaced, target)
    sampling = SamplingConfig(temperature=temperature or 0, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
    given = {**asdict(sampling), "temperature": temperature, "samples": samples, "system": system, "chat": chat}
    given["format"] = next(key for key, each in FORMATS.items() if each is form)
    mark = fingerprint([models.model_fingerprint(path), fingerprint(rows), given, dtype])
    done = _kept(part, mark, overwrite)
    resumed = len(done)
    if len(done) < len(rows):
        speaker = Speaker(path, dtype, chat, form.benchmark, system, str(prompts))
        pending = [number for number in range(len(rows)) if number not in done]
        with (
            progress_bar(f"answers of {path}", len(rows), done=resumed) as update,
            open(part, "a", encoding="utf-8") as stream,
        ):
            for start in range(0, len(pending), batch_rows):
                chosen = pending[start : start + batch_rows]
                asked = {(n, k): list(form.turns(rows[n])) for n in chosen for k in range(samples)}
                heat = {n: form.temperature(rows[n]) if temperature is None else temperature for n in chosen}
                seen = {n: {name: rows[n][name] for name in PICTURES if name in rows[n]} for n in chosen}
                how = {place: replace(sampling, temperature=heat[place[0]]) for place in asked}
                said = speaker.answers(asked, seen, how)
                for number in chosen:
                    done[number] = [said[number, k] for k in range(samples)]
                    stream.write(json_line({"row": number, "texts": done[number]}))
                stream.flush()
                os.fsync(stream.fileno())
                update(completed=len(done))
    answers = [form.answer(row, done[number], label) for number, row in enumerate(rows)]
    if target.suffix == ".jsonl":
        write_text(target, "".join(json_line(answer, as_json) for answer in answers))
    else:
        write_text(target, json.dumps(answers, ensure_ascii=False, indent=1, default=as_json) + "\n")
    part.unlink(missing_ok=True)
    return Generation(target, len(rows), resumed)


def _format(name: str | None, rows: Sequence[Any], file: str) -> Format:
    require(rows, DataError, "there are no rows", file=file, expected="at least one row")
    known = name is None or name in FORMATS
    require(known, RecipeError, f"format is {name!r}; expected one of {', '.join(FORMATS)}")
    first = rows[0] if isinstance(rows[0], Mapping) else {}
    found = next((form for form in FORMATS.values() if form.columns <= set(first)), None)
    form = FORMATS[name] if name is not None else found
    columns = "prompt, or the columns of a benchmark: " + "; ".join(
        f"{key}: {', '.join(sorted(each.columns))}" for key, each in FORMATS.items() if each.benchmark
    )
    for number, row in enumerate(rows):
        fits = form is not None and isinstance(row, Mapping) and form.columns <= set(row)
        expected = columns if form is None else ", ".join(sorted(form.columns))
        value = list(row) if isinstance(row, Mapping) else row
        what = "the row is no prompt"
        require(fits, DataError, what, file=file, row=number, value=value, expected=expected)
        assert form is not None  # it fits
        turns, field = form.turns(row), next(iter(form.columns - {"uid", "question_id"}))
        kinds = str if form.benchmark else (str, list)
        said = isinstance(turns, list) and turns and all(turn and isinstance(turn, kinds) for turn in turns)
        expected = "a list of texts" if field == "turns" else "text" if form.benchmark else "text or messages"
        require(said, DataError, what, file=file, row=number, field=field, value=row[field], expected=expected)
    assert form is not None  # there is a row, and it fits
    return form


def _target(prompts: Any, output: Any, form: Format, overwrite: bool) -> Path:
    target = Path(output)
    expected = f"expected a name that ends in {' or '.join(form.suffixes)}"
    require(target.suffix in form.suffixes, RecipeError, f"output is {str(target)!r}; {expected}")
    return check_output(target, prompts, overwrite)


def _kept(part: Path, mark: str, overwrite: bool) -> dict[int, list[list[str]]]:
    """The answers of an interrupted call, by row; begins the file if there is none."""
    lines = read_log(part) if part.exists() else []
    if lines and lines[0].get("settings") == mark:
        kept = {line["row"]: line["texts"] for line in lines[1:]}
    else:
        message = f"{part} holds answers with other settings; remove it, or overwrite it"
        require(overwrite or len(lines) < 2, RunError, message)
        kept = {}
    lines = [{"settings": mark}, *({"row": row, "texts": texts} for row, texts in kept.items())]
    write_text(part, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return kept


Place = tuple[int, int]  # a row and which of its samples


class Speaker:
    """A model that answers, turn by turn."""

    def __init__(
        self, path: str, dtype: Dtype, chat: bool | None, benchmark: bool, system: str | None, file: str
    ) -> None:
        spec = ModelSpec(path=path, dtype=dtype)
        self.reader = models.load_reader(spec, path)
        self.tokenizer = text_tokenizer(self.reader)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        model = models.load_model(spec, path, merge_adapter=True).to(device).requires_grad_(False)
        self.sampler, self.config = answering(model, self.tokenizer), TokenizeConfig(prompt_role=prompt_role(model))
        self.file, self.benchmark = file, benchmark
        self.chat = (benchmark and bool(self.reader.chat_template)) if chat is None else chat
        what = "a system message needs a chat template, which the model lacks, and chat"
        require(system is None or self.chat, ModelError, what)
        self.before = [{"role": "system", "content": system}] if system is not None else []

    def answers(
        self, asked: Mapping[Place, list[Any]], seen: Mapping[int, Row], how: Mapping[Place, SamplingConfig]
    ) -> dict[Place, list[str]]:
        """What the model says to each list of the user's turns; `seen` are the pictures of the rows."""
        said: dict[Place, list[str]] = {place: [] for place in asked}
        for turn in range(max(map(len, asked.values()))):
            groups: dict[SamplingConfig, list[Place]] = defaultdict(list)
            for place, turns in asked.items():
                if turn < len(turns):
                    groups[how[place]].append(place)
            for sampling, places in groups.items():
                prompts = [{**seen[p[0]], **self._prompt(p, asked[p], said[p])} for p in places]
                try:
                    items = encode_prompts(prompts, self.reader, self.config, file=self.file)
                except DataError as error:  # its row is one of these prompts
                    about = {key: getattr(error, key) for key in ("field", "value", "expected")}
                    raise DataError(error.what, file=self.file, row=places[int(str(error.row))][0], **about) from None
                found = self.sampler.sample(items, n=1, sampling=sampling).texts(self.tokenizer)
                for place, text in zip(places, found, strict=True):
                    said[place].append(text.strip() if self.benchmark else text)
        return said

    def _prompt(self, place: Place, turns: Sequence[Any], said: Sequence[str]) -> dict[str, Any]:
        """What comes before the next answer, as a row; its random numbers go by row, sample and turn."""
        row = {"id": f"{place[0]}/{place[1]}/{len(said)}"}
        if not isinstance(turns[0], str):  # messages
            return {**row, "prompt": [*self.before, *turns[0]]}
        what = "several turns need a chat template, which the model lacks"
        require(self.chat or not said, ModelError, what)
        if not self.chat:
            return {**row, "prompt": turns[0]}
        dialogue = [{"role": "user", "content": turns[0]}]
        for answer, question in zip(said, turns[1:], strict=False):
            dialogue += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return {**row, "prompt": [*self.before, *dialogue]}
