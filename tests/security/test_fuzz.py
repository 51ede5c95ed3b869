"""Whatever a file, a recipe, `--set` or a run folder holds: it is read, or one `TokengrainError` says what is wrong.

`make test` tries the same 300 inputs every time, `make test-slow` others for minutes. A failure prints the input.
"""

from __future__ import annotations

import copy
import gzip
import json
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import LlamaForCausalLM

from tests.test_error_messages import BASES, config, filled, tokenizer
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.rows import load_rows
from tokengrain.errors import TokengrainError
from tokengrain.report.html import write_report
from tokengrain.report.terminal import inspect_rows
from tokengrain.run.folder import make_plan
from tokengrain.run.load import load_recipe, make_recipe
from tokengrain.run.runner import run_recipe
from tokengrain.runs import read_run

SLOW = 1_500


class HangError(BaseException):
    """Not an `Exception`, so that nobody takes it for what a file is like."""


@contextmanager
def ends(seconds: int) -> Iterator[None]:
    """Raises `HangError` in what waits for ever."""

    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzzed(
    few: int, finished: bool = False, **arguments: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Any]:
    """A test of `few` inputs that are always the same, and a slow one of many others.

    Each gets an empty folder, or a copy of a `finished` run's.
    """

    def make(test: Callable[..., None]) -> Any:
        calm: dict[str, Any] = {
            "deadline": None,  # of the clock, which runs on while a busy machine does other things
            "suppress_health_check": list(HealthCheck),
            "database": None,
            "phases": [Phase.generate],  # to make an input smaller takes minutes
        }

        @pytest.mark.parametrize("count", [few, pytest.param(SLOW, marks=pytest.mark.slow)])
        def run(count: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
            start = request.getfixturevalue("finished") if finished else None

            @settings(max_examples=count, derandomize=count == few, **calm)
            @given(**arguments)
            def one(**drawn: Any) -> None:
                with tempfile.TemporaryDirectory(dir=tmp_path) as folder, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    if start is not None:
                        shutil.copytree(start / "run", Path(folder) / "run")
                    started = time.process_time()
                    with ends(seconds=300), suppress(TokengrainError):
                        test(Path(folder), **drawn)
                    assert time.process_time() - started < 20

            one()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return make


# ---- What inputs are made of: right ones, in which something is replaced, dropped, doubled or cut ----

NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**400, 1e30, 1e-300, float("nan"), float("inf"), -0.0]),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "\0", "x" * 5000, "../..", "/dev/zero", "{x}", "{", "@guide", "\ud83d", "a\nb", "\u2028", "null"]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
EDITS = st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(["set", "drop", "add", "swap"]), VALUES), max_size=3)
CUTS = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 4), st.binary(max_size=4)), max_size=2)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something in nested mappings and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inside for place in [(*at, key), *places(part, (*at, key))]]


def edited(value: Any, edits: list[tuple[int, str, Any]]) -> Any:
    """A copy in which things are replaced, dropped, added or exchanged."""
    value = copy.deepcopy(value)
    for number, how, new in edits:
        known = places(value)
        if not known:
            return new
        *above, key = known[number % len(known)]
        inside = value
        for step in above:
            inside = inside[step]
        if how == "drop":
            del inside[key]
        elif how == "add" and isinstance(inside, dict):
            inside[str(new)[:20]] = new
        elif how == "add":
            inside.append(new)
        elif how == "swap":
            other = known[(number // 7) % len(known)]
            source = value
            with suppress(LookupError, TypeError):
                for step in other:
                    source = source[step]
                inside[key] = copy.deepcopy(source)
        else:
            inside[key] = new
    return value


def cut(data: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    """The bytes with some replaced."""
    for at, length, new in cuts:
        at %= len(data) + 1
        data = data[:at] + new + data[at + length :]
    return data


def as_json(value: Any) -> str:
    return json.dumps(value, default=str)


# ---- Files of rows ----

ROWS: list[dict[str, Any]] = [
    {"prompt": "the sky is", "chosen": " blue today", "rejected": " black"},
    {"prompt": "the sky", "chosen": " is blue", "rejected": " is red", "score": 0.5, "tags": ["a", {"b": None}]},
    {
        "prompt": "the sky",
        "chosen": " is blue",
        "rejected": " is red",
        "chosen_token_rewards": [0.5, 1, -1],
        "rejected_token_rewards": [0.5, 1, -1],
    },
    {
        "prompt": "the sky",
        "chosen": " is blue",
        "rejected": " is red",
        "chosen_token_rewards": [{"start": 0, "end": 3, "reward": 1.0}],
        "rejected_token_rewards": [{"start": 1, "end": 6, "reward": -1}],
        "chosen_spans": [{"start": 0, "end": 3}],
        "rejected_spans": [{"start": 0, "end": 3, "id": 1}],
    },
    {
        "chosen": [{"role": "user", "content": "the sky"}, {"role": "assistant", "content": "is blue"}],
        "rejected": [{"role": "user", "content": "the sky"}, {"role": "assistant", "content": "is red"}],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
    },
    {"messages": [{"role": "user", "content": "the sky"}, {"role": "assistant", "content": "is blue"}]},
    {"conversations": [{"from": "human", "value": "the sky"}, {"from": "gpt", "value": "is blue"}]},
    {"instruction": "the sky", "input": "", "output": "is blue", "history": [["a", "b"]]},
    {"chosen": "\n\nHuman: the sky\n\nAssistant: is blue", "rejected": "\n\nHuman: the sky\n\nAssistant: is red"},
    {"prompt": "the sky", "completion": "is <MASK>blue</MASK>", "label": True},
    {"text": "the sky is blue"},
]
CONFIGS: list[dict[str, Any]] = [
    {},
    {"spans": "diff"},
    {"spans": "column", "on_invalid": "skip"},
    {"spans": "tags"},
    {"chat": True, "on_dropped": "keep"},
    {"max_length": 6, "max_prompt_length": 2},
]


def written(folder: Path, kind: str, rows: Any, cuts: list[tuple[int, int, bytes]]) -> Path:
    """A file of rows in a format, some of its bytes replaced."""
    path, listed = folder / f"rows.{kind}", [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []
    name, *zipped = kind.split(".")
    if name == "jsonl":
        data = "".join(as_json(row) + "\n" for row in rows or []).encode() if isinstance(rows, list) else b""
    elif name == "json":
        data = as_json(rows).encode()
    elif name == "csv":
        head = list(dict.fromkeys(str(key) for row in listed for key in row))
        table = [head, *([as_json(row.get(key)) for key in head] for row in listed)]
        data = "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in table).encode()
    else:
        with suppress(pa.ArrowException, OverflowError, UnicodeEncodeError):
            pq.write_table(pa.Table.from_pylist(listed), path)
        data = path.read_bytes() if path.exists() else b""
    data = gzip.compress(data) if zipped else data
    path.write_bytes(cut(data, cuts))
    return path


@fuzzed(
    120,
    start=st.integers(0, len(ROWS) - 1),
    edits=EDITS,
    cuts=st.just([]) | CUTS,
    kind=st.sampled_from(["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz"]),
    how=st.sampled_from(CONFIGS),
    pairs=st.booleans(),
)
def test_files_of_rows(folder: Path, start: int, edits: Any, cuts: Any, kind: str, how: Any, pairs: bool) -> None:
    rows = edited([ROWS[start], ROWS[(start + 1) % len(ROWS)]][: 1 + (start % 2)], edits)
    prepare = prepare_pairs if pairs else prepare_sft
    made = prepare(load_rows(written(folder, kind, rows, cuts)), tokenizer(chat=True), TokenizeConfig(**how))
    numbers = [v for s in made.samples for c in s.completions for column in c.columns.values() for v in column]
    assert bool(torch.isfinite(torch.tensor(numbers, dtype=torch.float32)).all()), "a number that is none was accepted"


# ---- Recipes and --set ----


def base(name: str, folder: Path) -> Any:
    (folder / "pairs.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    return filled(BASES[name], {"here": folder, "shared": folder})


def checked(recipe: Any) -> None:
    """What was accepted can be used: written, planned, and made into settings."""
    assert make_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True))))
    make_plan(recipe)


@fuzzed(60, name=st.sampled_from(["offline", "online", "finished"]), edits=EDITS, cuts=st.just([]) | CUTS)
def test_recipes(folder: Path, name: str, edits: Any, cuts: Any) -> None:
    made = edited(base(name, folder), edits)
    path = folder / "recipe.yaml"
    path.write_bytes(cut(as_json(made).encode() if edits else yaml.safe_dump(made).encode(), cuts))
    checked(load_recipe(path))


KEYS = st.sampled_from(
    [
        "seed",
        "output_dir",
        "data.train",
        "data.eval",
        "data.limit",
        "data.max_length",
        "data.eval_fraction",
        "data.columns",
        "data.spans",
        "model.path",
        "model.dtype",
        "training.learning_rate",
        "training.max_steps",
        "training.per_device_train_batch_size",
        "training.seed",
        "training.warmup_ratio",
        "training.lr_scheduler_type",
        "training.save_steps",
        "training.dataloader_num_workers",
        "lora",
        "lora.r",
        "training.num_train_epochs",
        "training.optim",
        "training.bf16",
        "training.label_names",
        "stages.train",
        "stages.train.kind",
        "stages.train.objective",
        "stages.train.objective.beta",
        "stages.train.objective.name",
        "stages.train.reference",
        "method",
        "stages.train.rewards.0",
        "stages.train.rewards.0.name",
        "stages.train.rewards.1.style",
        "stages.train.credit.0.name",
        "stages.train.training.num_generations",
        "stages.train.training.max_new_tokens",
        "stages.train.sampler.name",
        "stages.credit.credit.beta",
        "stages.credit.credit.model",
        "stages.guide.data",
        "stages.new",
        "on_world",
        "extends",
    ]
)
SETTINGS = st.one_of(
    st.builds(lambda key, value: f"{key}={as_json(value)}", KEYS, VALUES),
    st.builds(lambda key, value: f"{key}={value}", KEYS, TEXTS),
    st.builds(lambda key, more, value: f"{key}.{more}={value}", KEYS, TEXTS, TEXTS),
    TEXTS,
)


@fuzzed(60, name=st.sampled_from(["offline", "online", "finished"]), sets=st.lists(SETTINGS, min_size=1, max_size=3))
def test_settings(folder: Path, name: str, sets: list[str]) -> None:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(base(name, folder)))
    checked(load_recipe(path, overrides=sets))


# ---- Run folders ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and annotated, without its weights: nothing here reads them."""
    folder = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(folder / "model")
    tokenizer(chat=True).save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(ROWS[i % 2]) + "\n" for i in range(6)))
    made = filled(BASES["finished"], {"shared": folder})
    made["stages"] |= {"credit": {"kind": "annotate", "credit": {"name": "guide", "model": "@train", "beta": 0.3}}}
    run_recipe(make_recipe(made), console=Console(quiet=True))
    for weights in (folder / "run").rglob("*.safetensors"):
        weights.unlink()
    return folder


FILES = ["run.json", "recipe.yaml", "metrics.json", "credit_samples.json"]
FILES += [f"{stage}/{name}" for stage in ("train", "credit") for name in ("stage.json", "metrics.json")]
FILES += ["train/log.jsonl", "credit/manifest.json", "credit/train.parquet", "train/model/tokenizer_config.json"]


@fuzzed(60, finished=True, name=st.sampled_from(FILES), edits=EDITS, cuts=CUTS, whole=st.booleans())
def test_run_folders(folder: Path, name: str, edits: Any, cuts: Any, whole: bool) -> None:
    path = folder / "run" / name
    if path.suffix in (".json", ".yaml") and whole:
        path.write_text(as_json(edited(yaml.safe_load(path.read_text()), edits)))
    else:
        path.write_bytes(cut(path.read_bytes(), cuts))
    for use in (
        lambda run: read_run(run).metrics,
        lambda run: make_plan(load_recipe(run / "recipe.yaml", output=run)),
        lambda run: inspect_rows(run, console=Console(quiet=True)),
        write_report,
    ):
        with suppress(TokengrainError):
            use(folder / "run")
