"""A full disk, files that are none, damaged checkpoints, absurd numbers: one error that says what is wrong."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.mounts import make_read_only, may_mount, small_disk
from tests.test_error_messages import tokenizer
from tests.test_stages import TGDPO, values
from tests.training.test_resume import KillAt, build, in_child
from tokengrain.cli import main
from tokengrain.data.dataset import prepare_sft
from tokengrain.data.rows import load_rows
from tokengrain.errors import DataError, ModelError, RecipeError, RunError, TokengrainError, read_json
from tokengrain.models import load_model, load_tokenizer
from tokengrain.report.html import write_report
from tokengrain.run.load import load_recipe, make_recipe
from tokengrain.run.runner import evaluate_run, run_recipe
from tokengrain.specs import ModelSpec
from tokengrain.training.checkpoint import check_files, last_complete_checkpoint

EVENTS = {"prompts": "sampled"}


def run(recipe: dict[str, Any]) -> None:
    run_recipe(make_recipe(recipe), console=Console(quiet=True))


# ---- A disk that takes no more ----


def outcome(work: Callable[[], None], bytes_of_a_file: int | None = None) -> str:
    """What a child process made of it: "done", or the kind of the error and its message."""
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)

    def child() -> None:
        if bytes_of_a_file is not None:  # no file may become longer: as on a full disk, the write fails half way
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, bytes_of_a_file))
        try:
            work()
            writer.send("done")
        except BaseException as error:
            writer.send(f"{type(error).__name__}: {error}")
        os._exit(0)

    in_child(child)
    return str(reader.recv()) if reader.poll(1) else "nothing"


SIZES = [0, 700, 20_000]


@pytest.mark.parametrize(
    "size",
    [s if s in SIZES else pytest.param(s, marks=pytest.mark.slow) for s in (0, 100, 700, 3000, 9000, 20_000, 40_000)],
)
def test_a_file_that_cannot_be_written_whole(size: int, tmp_path: Path) -> None:
    recipe = values(tmp_path)
    found = outcome(lambda: run(recipe), size)
    assert found.startswith("RunError: "), found
    assert not list(tmp_path.rglob("*.tmp*"))
    assert outcome(lambda: run(recipe)) == "done"


@pytest.mark.slow
@may_mount
@pytest.mark.parametrize("kilobytes", range(4, 400, 16))
def test_a_full_disk_at_any_point(kilobytes: int, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        recipe = values(tmp_path, TGDPO, output_dir=str(disk / "run"))
        found = outcome(lambda: run(recipe))
    assert found == "done" or (found.startswith("RunError: ") and "no space left on the device" in found)


@may_mount
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """One error, before anything is read or trained."""
    place = tmp_path / "read-only"
    place.mkdir()

    def work() -> None:
        make_read_only(place)
        run(values(tmp_path, output_dir=str(place / "run")))

    assert re.fullmatch(rf"RunError: {place / 'run'}: Read-only file system", outcome(work))


# ---- Files that are no files ----


def pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def device(path: Path) -> Path:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")
    return path


def folder(path: Path) -> Path:
    path.unlink(missing_ok=True)
    path.mkdir()
    return path


def sockets(path: Path) -> Path:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))
    return path


def forbidden(path: Path) -> Path:
    path.touch()
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    return path


NO_FILES = [pipe, device, folder, forbidden]


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz", "rows.csv", "rows.parquet", "README.md"])
def test_rows(make: Callable[[Path], Path], name: str, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text("{}\n")
    path = make(tmp_path / name)
    if name == "README.md" or make is folder:
        path = tmp_path if name == "README.md" else path
    with pytest.raises(DataError, match=r"expected a file|cannot be read|holds no file of rows"):
        load_rows(path)


@pytest.mark.parametrize("make", NO_FILES)
def test_recipes(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load_recipe(make(tmp_path / "r.yaml"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("finished")
    run(values(place))
    return place


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "train/stage.json", "metrics.json"])
def test_run_folders(make: Callable[[Path], Path], name: str, copied: Path) -> None:
    make(copied / "run" / name)
    found = outcome(lambda: [run(values(copied)), main(["report", str(copied / "run")])])
    assert found.startswith(("RunError", "SystemExit: 2")), found


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_models(make: Callable[[Path], Path], name: str, copied: Path) -> None:
    path = copied / "run" / "train" / "model"
    if (name, make) == ("generation_config.json", folder):
        pytest.skip("transformers passes over it")
    make(path / name)
    with pytest.raises(ModelError, match=rf"{name}|no (model|tokenizer) could be loaded"):
        [load(ModelSpec(path=str(path)), str(path)) for load in (load_tokenizer, load_model)]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(number: float, copied: Path) -> None:
    file = copied / "run" / "train" / "model" / "model.safetensors"
    held = load_file(file)
    held["model.norm.weight"][1] = number
    save_file(held, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"weights in .*model are not finite: model\.norm\.weight$"):
        evaluate_run(copied / "run")


@pytest.mark.parametrize("time", ["yesterday", 5, ["2026-01-01"]])
def test_a_time_that_is_none(time: Any, copied: Path) -> None:
    path = copied / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "template_time": time}))
    with pytest.raises(RunError, match=r"run\.json is damaged: template_time: "):
        evaluate_run(copied / "run")


def test_half_a_character_in_a_run_folder(copied: Path) -> None:
    path = copied / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "method": "x\ud83d"}))
    assert "x\\ud83d" in write_report(copied / "run").read_text()


@pytest.fixture(scope="module")
def adapter(finished: Path) -> Path:
    folder, base = finished / "adapter", finished / "run" / "train" / "model"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(base))
    made: Any = peft.get_peft_model(load_model(ModelSpec(path=str(base)), str(base)), config)
    made.save_pretrained(folder)
    return folder


LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(LORA), r"lack tensors of this adapter: .*layers\.0\.self_attn\.q_proj\.lora_A"),
        (lambda held: held.update(other=torch.zeros(2)), "have tensors that are none of this adapter: other"),
        (lambda held: held[LORA].fill_(math.nan), r"are not finite: .*layers\.0\.self_attn\.q_proj\.lora_A"),
    ],
)
def test_an_adapter_has_its_tensors(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, adapter: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    held = load_file(mine / "adapter_model.safetensors")
    change(held)
    save_file(held, mine / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=message):
        load_model(ModelSpec(path=str(mine)), str(mine))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"base_model_name_or_path": "ITSELF"}, "names itself as the base model"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config, for which peft imports"),
    ],
)
def test_what_an_adapter_may_not_say(said: dict[str, Any], message: str, adapter: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    known = json.loads((mine / "adapter_config.json").read_text())
    text = json.dumps({**known, **said}).replace("ITSELF", str(mine))
    (mine / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_model(ModelSpec(path=str(mine)), str(mine))


def test_an_adapters_weights_are_a_file(adapter: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (mine / "adapter_model.safetensors").unlink()
    os.mkfifo(mine / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is a named pipe; expected a file"):
        load_model(ModelSpec(path=str(mine)), str(mine))


# ---- Damaged checkpoints ----


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scrambled(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 40 : middle + 40] = bytes(80)
    path.write_bytes(bytes(data))


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 3)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path.cwd() / "ran"),)


def evil(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil()))


def zipped_evil(path: Path) -> None:
    torch.save({"state": Evil()}, path)


FILES = ["rng_state.pth", "optimizer.pt", "scheduler.pt", "trainer_state.json", "tokengrain_state.json"]
DAMAGES = [emptied, halved, noise, evil, zipped_evil]
FEW = {
    ("rng_state.pth", emptied),
    ("optimizer.pt", halved),
    ("scheduler.pt", zipped_evil),
    ("trainer_state.json", emptied),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("killed")
    in_child(lambda: build(place, "full", [KillAt("log", 6)]).train() and None)
    return place


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=[] if (name, damage) in FEW else pytest.mark.slow)
        for name in [*FILES, "model.safetensors"]
        for damage in DAMAGES
    ],
)
def test_damaged_checkpoints(
    name: str, damage: Callable[[Path], None], killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    last = last_complete_checkpoint(tmp_path)
    assert last is not None
    damage(last / name)
    advice = r"remove it to resume from checkpoint-\d"
    with pytest.raises(RunError, match=rf"{last.name} is damaged or incomplete: .*{advice}|{name} is damaged") as error:
        build(tmp_path, "full").train(resume_from_checkpoint=True)
    assert name.split(".")[0] in str(error.value) or "weights" in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_without_random_numbers(killed: Path, tmp_path: Path) -> None:
    """transformers would go on with others."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    last: Any = last_complete_checkpoint(tmp_path)
    (last / "rng_state.pth").unlink()
    with pytest.raises(RunError, match=rf"{last.name} is damaged.*rng_state.pth .* is not there; remove it to resume"):
        build(tmp_path, "full").train(resume_from_checkpoint=True)


def test_a_checkpoint_whose_parts_are_of_two_steps(killed: Path, tmp_path: Path) -> None:
    """transformers would take the run for done."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    last: Any = last_complete_checkpoint(tmp_path)
    state = last / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "global_step": 9999}))
    with pytest.raises(RunError, match=rf"{last.name} is damaged.*state.json is of step 9999, .* of step \d; remove"):
        build(tmp_path, "full").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "config.json"])
def test_a_folder_in_place_of_a_checkpoints_file(name: str, tmp_path: Path) -> None:
    """transformers would pass over it, and resume with other random numbers."""
    (tmp_path / name).mkdir()
    with pytest.raises(RunError, match=f"{name} is a folder; expected a file"):
        check_files(tmp_path)


def test_the_index_of_a_sharded_checkpoint_names_records_only(tmp_path: Path) -> None:
    state = {"weight": torch.ones(3, 2), "step": 3, "names": ["a", None]}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    check_files(tmp_path)
    for call in (Evil(), _named("torch.distributed.checkpoint.filesystem", "os.mkdir"), _named("builtins", "eval")):
        (tmp_path / ".metadata").write_bytes(call if isinstance(call, bytes) else pickle.dumps(call))
        with pytest.raises(RunError, match=r"\.metadata names \S+; it is not loaded"):
            check_files(tmp_path)


def _named(module: str, name: str) -> bytes:
    """A pickle of a call of `module.name` with one argument."""
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + words + b"\x93\x8c\x03ran\x85R."


# ---- Numbers ----


@pytest.mark.parametrize(
    "override",
    [
        "seed=99999999999999999999999",
        "training.learning_rate=1e30",
        "training.per_device_train_batch_size=1000000000000",
        "training.gradient_accumulation_steps=1000000000000",
        "training.dataloader_num_workers=100000",
        "training.num_train_epochs=1e17",
        "training.max_steps=10000000000000000000000",
        "data.max_length=100000000000000000000000000",
        "model.config.num_hidden_layers=1000000000",
        "model.config.hidden_size=1000000000",
        "model.config.vocab_size=100000000000000",
        "model.tokenizer.vocab_size=100000000000",
        "lora={r: 1000000000}",
        "stages.train.objective.beta=.inf",
        "stages.train.objective.beta=-1e400",
    ],
)
def test_absurd_numbers_are_refused_at_once(override: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(values(tmp_path)))
    with pytest.raises(TokengrainError, match=override.rpartition("=")[0].split(".")[-1].removesuffix("_size")):
        run_recipe(load_recipe(path, overrides=[override]), console=Console(quiet=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}', "row 0.*key 'chosen' is given twice"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "x": {"y": 1, "y": 2}}', "key 'y' is given twice"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "score": NaN}', "field 'score' is nan, which is no number"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "s": [1, -Infinity]}', r"field 's'\[1\] is -inf"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "s": {"t": 1e999}}', r"field 's'\['t'\] is inf"),
        ('{"prompt": ' + "[" * 100_000, "row 0"),
        ('{"score": ' + "9" * 5000 + "}", "row 0"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_json_that_python_would_take(text: str, message: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_text(text if kind == "jsonl" else f"[{text}]")
    with pytest.raises(DataError, match=rf"rows\.{kind}: .*{message}"):
        load_rows(path)


def test_many_names_are_compared_once(tmp_path: Path) -> None:
    names = [f"column{i}" for i in range(50_000)]
    (tmp_path / "rows.csv").write_text(",".join([*names, names[-1]]) + "\n")
    pairs = ", ".join(f'"{name}": 1' for name in [*names, names[-1]])
    (tmp_path / "rows.jsonl").write_text(f"{{{pairs}}}\n")
    started = time.process_time()
    for name in ("rows.csv", "rows.jsonl"):
        with pytest.raises(DataError, match="column49999"):
            load_rows(tmp_path / name)
    assert time.process_time() - started < 10, "some 30 s each where every name is counted anew"


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([2**62], pa.timestamp("ms")), r"cannot be read as timestamp\[ms\]"),
        (pa.array([2**62], pa.duration("s")), r"cannot be read as duration\[s\]"),
        (pa.array([2**31 - 1], pa.date32()), r"cannot be read as date32\[day\]"),
    ],
)
def test_times_that_python_lacks(column: pa.Array, message: str, tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], "when": column})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=rf"row 0: field 'when': {message}"):
        load_rows(tmp_path / "rows.parquet")


def test_a_column_of_parquet_stands_once(tmp_path: Path) -> None:
    arrays = [pa.array([text]) for text in ("a", "b", "c", "d")]
    pq.write_table(
        pa.Table.from_arrays(arrays, names=["prompt", "chosen", "rejected", "chosen"]), tmp_path / "rows.parquet"
    )
    with pytest.raises(DataError, match="column name is repeated in the header; got 'chosen'"):
        load_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ('{"a": {"file_name": "."}}', "the folder holds no file of rows"),
        ('{"a": {"file_name": "rows.jsonl", "columns": {"prompt": ["x"]}}}', "columns is no object of names"),
        ('{"a": {"file_name": "rows.jsonl", "tags": {"user_tag": {}}}}', "tags is no object of names"),
        ("[" * 100_000, "the folder holds no file of rows"),
    ],
)
def test_a_dataset_info_that_leads_nowhere(about: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(about)
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path)


def test_a_readme_names_files_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for path, text in (("secret.jsonl", "secret"), ("mine/rows.jsonl", "mine")):
        (tmp_path / path).write_text(json.dumps({"text": text}) + "\n")
    header = '---\nconfigs:\n- config_name: default\n  data_files: "../**/*.jsonl"\n---\n'
    (tmp_path / "mine" / "README.md").write_text(header)
    assert [fields for _, fields in load_rows(tmp_path / "mine")] == [{"text": "mine"}]


@pytest.mark.parametrize("weight", [1e12, math.inf, math.nan, True, -1])
def test_a_weight_that_no_machine_holds(weight: float, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="unusable weight"):
        load_rows({str(tmp_path / "rows.jsonl"): weight})


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": {"from": "human"}, "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": 5}]},
        {"prompt": "a", "completion": "b", "tools": "[" * 100_000},
        {"prompt": "a", "completion": "b", "token_rewards": "[" * 100_000},
        {"prompt": "a", "completion": "b", "tools": '[{"type": "function", "function": {"strict": NaN}}]'},
    ],
)
def test_rows_that_a_fuzzer_found(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="row 0"):
        prepare_sft([row], tokenizer(chat=True))


def test_no_machine_samples_so_often(finished: Path) -> None:
    with pytest.raises(RecipeError, match=r"samples is 1000000000000; expected at least 1 and at most 1000000"):
        evaluate_run(finished / "run", samples=10**12)


def test_a_key_of_a_run_file_stands_once(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "done", "status": "failed"}')
    with pytest.raises(RunError, match=r"run\.json is damaged: key 'status' is given twice"):
        read_json(tmp_path / "run.json")


@pytest.mark.parametrize(
    "text",
    [
        "{a: " * 2000,
        "a: &a [1]\nb: &b [*a, *a]\n"
        + "".join(f"c{i}: &c{i} [{'*b' if not i else f'*c{i - 1}'}, *b]\n" for i in range(20)),
        "a: &a\n  b: *a\n",
        "seed: 2020-99-99",
        "seed: !!timestamp x",
        "seed: !!bool x",
        "seed: !!python/object/apply:os.system [true]",
        "seed: 0b",
        "? [a, b]\n: 1",
        "a: 1\na: 2",
    ],
)
def test_yaml_that_is_no_recipe(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml") as raised:
        load_recipe(path)
    assert "recursion" not in str(raised.value)


# ---- What killed processes leave ----


def test_what_a_killed_run_left_is_gone_after_the_next(copied: Path) -> None:
    stage = copied / "run" / "train"
    left = [copied / "run" / ".run.123.456.tmp.json", stage / ".log.9.1.tmp.jsonl", stage / ".saving" / "model" / "x"]
    left.append(stage / "train.shards" / "shard-00000.parquet")
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    (copied / "run" / ".notes.tmp").write_text("the user's own")
    run(values(copied))
    assert not [path for path in left if path.exists()]
    assert (copied / "run" / ".notes.tmp").exists()
