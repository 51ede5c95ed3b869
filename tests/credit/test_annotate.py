"""annotate: killed, resumed or by two processes, the file is the same; bad input names its culprit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.credit.annotate_worker import FINGERPRINTS, PlainLlama, make_rows, make_tokenizer, run
from tests.credit.small import llama
from tokengrain import annotation
from tokengrain.annotation import annotate, check_manifest, load_annotated, read_manifest
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.data.dataset import PairDataset, Report, SampleStore, prepare_pairs, prepare_sft
from tokengrain.errors import DataError, RunError
from tokengrain.method import make_credit
from tokengrain.scoring.reference import FrozenReference

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an annotation that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "train.parquet"
    run(path)
    return path


def start(output: Path, seconds: float = 0.0, **environment: str) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.credit.annotate_worker", str(output), str(seconds)]
    return subprocess.Popen(command, env=env | environment, cwd=ROOT, stderr=subprocess.PIPE)


def test_file_has_the_rows_and_the_numbers_of_the_model(finished: Path) -> None:
    rows, source = make_rows(), PlainLlama()
    table = pq.read_table(finished)
    for name in ("id", "prompt", "chosen", "rejected", "tags", "score", "note"):
        assert table[name].to_pylist() == [r.get(name) for r in rows]
    samples = prepare_pairs(rows, make_tokenizer()).samples
    for sample, written in zip(samples, table.to_pylist(), strict=True):
        assert written["prompt_ids"] == sample.prompt_ids
        with torch.no_grad():  # one row at a time: batching and sorting must not show
            expected = source(TokenBatch.from_samples([sample])).tolist()
        assert written["chosen_ids"] == sample.completions[0].ids
        assert written["rejected_ids"] == sample.completions[1].ids
        got = written["chosen_token_rewards"] + written["rejected_token_rewards"]
        assert got == pytest.approx(expected, abs=1e-5)
        assert len(written["chosen_token_rewards"]) == len(written["chosen_ids"])


def test_manifest_says_what_the_file_was_made_with(finished: Path) -> None:
    manifest = json.loads((finished.parent / "manifest.json").read_text())["files"]["train.parquet"]
    assert manifest["fingerprints"] == FINGERPRINTS
    assert manifest == read_manifest(finished)
    assert sorted(p.name for p in finished.parent.iterdir()) == ["manifest.json", "train.parquet"]


def test_killed_run_continues_and_ends_with_the_same_file(finished: Path, tmp_path: Path) -> None:
    output, shards = tmp_path / "train.parquet", tmp_path / "train.shards"
    process = start(output, seconds=0.25)
    try:
        deadline = time.monotonic() + 120
        while len(list(shards.glob("shard-*.parquet"))) < 3 and process.poll() is None:
            assert time.monotonic() < deadline, "no shards were written"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert not output.exists()
    kept = sorted(shards.glob("shard-*.parquet"))
    assert 3 <= len(kept) < 10
    # What a kill leaves at other moments: half of a shard, half of the merged file.
    (shards / "shard-00009.parquet").write_bytes(kept[0].read_bytes()[:100])
    (tmp_path / ".train.123.tmp.parquet").write_bytes(b"PAR1")
    source = run(output)
    assert output.read_bytes() == finished.read_bytes()
    # The kept shards were not computed again.
    assert source.tokens < sum(prepare_pairs(make_rows(), make_tokenizer()).lengths)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "train.parquet"]


def test_a_kill_between_file_and_manifest_leaves_no_trace(finished: Path, tmp_path: Path) -> None:
    copied = tmp_path / finished.name
    shutil.copy(finished, copied)  # the manifest is not there yet
    run(copied)
    assert (tmp_path / "manifest.json").read_bytes() == (finished.parent / "manifest.json").read_bytes()


def test_two_processes_write_the_same_file(finished: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    output = tmp_path / "train.parquet"
    both = [start(output, RANK=str(r), LOCAL_RANK=str(r), **world) for r in range(2)]
    errors = [p.communicate(timeout=120)[1].decode() for p in both]
    assert [p.returncode for p in both] == [0, 0], errors
    assert output.read_bytes() == finished.read_bytes()


def test_finished_file_is_used_again(finished: Path) -> None:
    before = finished.stat().st_mtime_ns
    assert run(finished).tokens == 0
    assert finished.stat().st_mtime_ns == before


def test_rows_with_another_column_are_not_taken_for_those_of_the_file(tmp_path: Path) -> None:
    """The tokens are the same, the rows are not."""

    def made(note: str) -> Path:
        rows, sources = [{**row, "note": note} for row in make_rows()[:4]], {"token_rewards": make_credit("random")}
        return annotate(rows, make_tokenizer(), None, sources, output=tmp_path / "a.parquet", progress=False)

    assert made("old") == made("old")
    with pytest.raises(RunError, match="is there already and has other rows, columns or settings"):
        made("new")


def test_output_made_with_another_model_is_not_overwritten(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    output.write_bytes(finished.read_bytes())
    other = FINGERPRINTS | {"model": "0000"}
    with pytest.raises(RunError, match=r"another model .file: aaaa, now: 0000."):
        run(output, fingerprints=other)
    assert output.read_bytes() == finished.read_bytes()
    assert run(output, fingerprints=other, overwrite=True).tokens > 0
    assert read_manifest(output)["fingerprints"] == other


def test_without_fingerprints_sources_and_reference_give_their_own(tmp_path: Path) -> None:
    output, tokenizer = tmp_path / "train.parquet", make_tokenizer()
    small, other = ({"token_rewards": make_credit("random", seed=seed)} for seed in (0, 1))

    def zeros(batch: TokenBatch) -> torch.Tensor:
        return torch.zeros(batch.segments.total)

    def made(sources: dict[str, Any], reference: Any = None) -> Path:
        return annotate(make_rows(3), tokenizer, None, sources, reference, output, progress=False)

    assert made(small) == made(small)
    for sources in (other, {"token_rewards": zeros}):
        with pytest.raises(RunError, match="another credit source"):
            made(sources)
    output.unlink()
    torch.manual_seed(0)
    first, second = (FrozenReference(llama()) for _ in range(2))
    made(small, first)
    made(small, first)
    with torch.no_grad():
        next(second.model.parameters()).add_(1)
    with pytest.raises(RunError, match="another reference model"):
        made(small, second)


def test_shards_of_another_source_are_computed_again(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    shards = tmp_path / "train.shards"
    shards.mkdir()
    foreign = pq.read_table(finished).slice(0, 4)
    annotation.write_shard(shards / "shard-00000.parquet", {n: foreign[n] for n in foreign.column_names}, "other")
    run(output)
    assert output.read_bytes() == finished.read_bytes()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model", "another model"),
        ("tokenizer", "another tokenizer"),
        ("chat_template", "another chat template"),
        ("data", "another data"),
        ("source", "another credit source"),
    ],
)
def test_mismatch_at_training_time_names_the_culprit(finished: Path, name: str, words: str) -> None:
    assert check_manifest(finished, FINGERPRINTS)["rows"] == 40
    with pytest.raises(RunError, match=f"{words} .file: {FINGERPRINTS[name]}, now: 9999.") as caught:
        load_annotated(finished, None, FINGERPRINTS | {name: "9999"})
    others = set(FINGERPRINTS) - {name}
    assert not any(f"file: {FINGERPRINTS[n]}" in str(caught.value) for n in others)


def test_loading_gives_the_stored_ids_and_columns(finished: Path) -> None:
    loaded = load_annotated(finished, make_tokenizer(), FINGERPRINTS)
    original = prepare_pairs(make_rows(), make_tokenizer())
    assert len(loaded) == len(original) == 40
    for got, expected, row in zip(loaded.samples, original.samples, make_rows(), strict=True):
        assert got.prompt_ids == expected.prompt_ids
        assert [c.ids for c in got.completions] == [c.ids for c in expected.completions]
        assert got.raw["prompt"] == row["prompt"]
    batch = TokenBatch.from_samples([loaded[0], loaded[1]])
    with torch.no_grad():
        expected_rewards = PlainLlama()(batch)
    torch.testing.assert_close(batch.columns["token_rewards"], expected_rewards, atol=1e-5, rtol=0)


def test_loading_with_a_smaller_tokenizer_fails(finished: Path) -> None:
    with pytest.raises(RunError, match="the tokenizer has only 2 tokens"):
        load_annotated(finished, ["a", "b"])


def test_file_is_ordinary_data_too(finished: Path, tmp_path: Path) -> None:
    """Other tools can read it, and so can `prepare_pairs`, from text."""
    import datasets

    read = datasets.load_dataset("parquet", data_files=str(finished), split="train", cache_dir=str(tmp_path))
    assert read[5]["chosen_token_rewards"] == pq.read_table(finished)["chosen_token_rewards"][5].as_py()
    batch = TokenBatch.from_samples(list(prepare_pairs(str(finished), make_tokenizer()).samples[:3]))
    same = TokenBatch.from_samples(list(load_annotated(finished).samples[:3]))
    torch.testing.assert_close(batch.columns["token_rewards"], same.columns["token_rewards"])


def test_file_that_annotate_did_not_write(tmp_path: Path) -> None:
    import pyarrow as pa

    path = tmp_path / "own.parquet"
    with pytest.raises(RunError, match="no such annotated file"):
        check_manifest(path, {})
    path.write_bytes(b"not parquet")
    with pytest.raises(RunError, match="not a parquet file"):
        check_manifest(path, {})
    pq.write_table(pa.table({"prompt": ["a"]}), path)
    with pytest.raises(RunError, match="does not say which model"):
        check_manifest(path, {})


def quick(output: Path, source: Any, data: Any = None, **options: Any) -> Path:
    data = make_rows(12) if data is None else data
    options = {"shard_rows": 4, "progress": False} | options
    return annotate(data, make_tokenizer(), None, source, output=output, **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_names_row_and_column_and_keeps_finished_shards(tmp_path: Path, bad: float) -> None:
    def source(batch: TokenBatch) -> torch.Tensor:
        values = torch.ones(batch.segments.total)
        if 6 in batch.rows:
            start = int(batch.segments.offsets[2 * batch.rows.index(6) + 1])
            values[start + 2] = bad
        return values

    with pytest.raises(DataError, match=r"row 6: field 'rejected_token_rewards': token 2 .* not finite"):
        quick(tmp_path / "out.parquet", {"token_rewards": source})
    assert [p.name for p in (tmp_path / "out.shards").iterdir()] == ["shard-00000.parquet"]
    assert not (tmp_path / "out.parquet").exists()


def test_source_with_a_wrong_number_of_values(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'token_rewards' gave a wrong number of values"):
        quick(tmp_path / "out.parquet", {"token_rewards": lambda batch: torch.zeros(3)})


def test_full_disk_says_what_to_do_and_keeps_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, count = pq.write_table, 0

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            Path(args[1]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr(pq, "write_table", full)
    source = {"token_rewards": lambda batch: torch.ones(batch.segments.total)}
    with pytest.raises(RunError, match=r"no space left .*2 of 3 shards are finished and kept in .*same command"):
        quick(tmp_path / "out.parquet", source)
    assert len(list((tmp_path / "out.shards").iterdir())) == 2
    quick(tmp_path / "out.parquet", source)
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 12


def test_ctrl_c_keeps_finished_shards(tmp_path: Path) -> None:
    calls = 0

    def source(batch: TokenBatch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return torch.ones(batch.segments.total)

    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "out.parquet", {"token_rewards": source})
    names = sorted(p.name for p in (tmp_path / "out.shards").iterdir())
    assert names == ["shard-00000.parquet", "shard-00001.parquet"]


def test_reference_logps_are_stored_and_asked_once(tmp_path: Path) -> None:
    class Reference:
        calls = 0

        def __call__(self, batch: TokenBatch, want: set[str]) -> SimpleNamespace:
            Reference.calls += 1
            assert set(want) == {"logps"}
            return SimpleNamespace(logps=-batch.labels.float())

    class Ratio:
        name = "ratio"

        def __init__(self, reference: Any) -> None:
            self.reference = reference

        def __call__(self, batch: TokenBatch) -> torch.Tensor:
            return 1.0 - self.reference(batch, {"logps"}).logps

    reference = Reference()
    source = Ratio(reference)
    path = quick(tmp_path / "out.parquet", {"token_rewards": source}, reference=reference)
    for row in pq.read_table(path).to_pylist():
        assert row["chosen_ref_logps"] == [-float(t) for t in row["chosen_ids"]]
        assert row["rejected_token_rewards"] == [1.0 + t for t in row["rejected_ids"]]
    assert Reference.calls == 3  # one per shard: the source and the column share it
    assert source.reference is reference


def test_guide_and_reference_logps_share_the_forward_pass_of_the_frozen_model(tmp_path: Path) -> None:
    from tokengrain.method import make_credit
    from tokengrain.scoring.reference import FrozenReference
    from tokengrain.scoring.score import score

    guide, frozen = PlainLlama().model, PlainLlama().model
    with torch.no_grad():
        guide.lm_head.weight.mul_(1.5)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    score(frozen, TokenBatch.from_samples([prepare_pairs(make_rows(1), make_tokenizer())[0]]))  # the probe
    frozen.register_forward_hook(count)
    source = make_credit("guide", model=guide, reference=frozen, beta=0.5)
    path = quick(tmp_path / "out.parquet", {"token_rewards": source}, reference=FrozenReference(frozen))
    assert passes == 3  # one per shard
    samples = list(load_annotated(path).samples)
    batch = TokenBatch.from_samples(samples)
    with torch.no_grad():
        expected = 0.5 * (score(guide, batch).logps - score(frozen, batch).logps)
    torch.testing.assert_close(batch.columns["token_rewards"], expected, atol=1e-5, rtol=0)


def test_prepared_data_with_its_rows_keeps_all_columns(tmp_path: Path) -> None:
    from tokengrain.data.rows import load_rows

    rows = load_rows(make_rows(8))
    data, source = (
        prepare_pairs(rows, make_tokenizer()),
        {"r": lambda batch: torch.ones(batch.segments.total)},
    )
    without = pq.read_table(quick(tmp_path / "a.parquet", source, data))
    assert "note" not in without.column_names
    assert without["prompt"].to_pylist() == [row["prompt"] for _, row in rows]
    whole = pq.read_table(quick(tmp_path / "b.parquet", source, data, rows=rows))
    assert whole["note"].to_pylist() == [row.get("note") for _, row in rows]


def test_skipped_rows_do_not_shift_the_others(tmp_path: Path) -> None:
    from tokengrain.data.config import TokenizeConfig

    rows = make_rows(6)
    rows[2]["chosen"] = ""
    source = {"token_rewards": lambda batch: batch.labels.float()}
    config, output = TokenizeConfig(on_invalid="skip"), tmp_path / "out.parquet"
    annotate(rows, make_tokenizer(), config, source, output=output, shard_rows=2, progress=False)
    table = pq.read_table(output)
    assert table["id"].to_pylist() == [0, 1, 3, 4, 5]
    for row in table.to_pylist():
        assert row["chosen"].split() == make_tokenizer().decode(row["chosen_ids"], skip_special_tokens=True).split()


def test_single_completions_and_tokens_that_do_not_count(tmp_path: Path) -> None:
    samples = SampleStore()
    samples.append(Sample([1, 2], [Completion([3, 4, 5, 6], [True, False, True, True])], row=0))
    samples.append(Sample([1], [Completion([7, 8])], row=1))
    data = PairDataset(samples, Report(kept=2), "made by hand")
    source = {"token_rewards": lambda batch: batch.labels.float() / 10}
    path = quick(tmp_path / "out.parquet", source, data)
    rows = pq.read_table(path).to_pylist()
    assert rows[0]["token_rewards"] == pytest.approx([0.3, 0.0, 0.5, 0.6])
    assert rows[0]["completion_counted"] == [True, False, True, True]
    assert rows[1]["completion_ids"] == [7, 8]
    loaded = load_annotated(path)
    assert loaded[0].completions[0].counted == [True, False, True, True]
    assert list(loaded[0].completions[0].columns["token_rewards"]) == pytest.approx([0.3, 0.5, 0.6])


def test_prompt_and_completion_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "the sea", "completion": " was kind ."}, {"prompt": "a pirate", "completion": " hurt"}]
    data = prepare_sft(rows, make_tokenizer())
    path = quick(tmp_path / "out.parquet", {"token_rewards": lambda batch: batch.labels.float()}, data)
    for row in pq.read_table(path).to_pylist():
        assert row["token_rewards"] == [float(t) for t in row["completion_ids"]]


def test_mixed_types_in_a_column_become_json_text(tmp_path: Path) -> None:
    rows = make_rows(4)
    for i, row in enumerate(rows):
        row["extra"] = [1, "two", {"three": 3}, None][i]
    path = quick(tmp_path / "out.parquet", {"r": lambda batch: torch.ones(batch.segments.total)}, rows)
    assert pq.read_table(path)["extra"].to_pylist() == ["1", '"two"', '{"three": 3}', "null"]


def test_nothing_to_annotate(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at least one credit source or a reference"):
        quick(tmp_path / "out.parquet", {})


def test_batches_hold_rows_of_similar_length(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def source(batch: TokenBatch) -> torch.Tensor:
        lengths = [batch.select([g]).n_tokens for g in range(batch.n_prompts)]
        seen.append((max(lengths) * len(lengths), sum(lengths)))
        return torch.ones(batch.segments.total)

    quick(tmp_path / "out.parquet", {"r": source}, make_rows(64), shard_rows=64, max_tokens=128)
    assert all(padded <= 128 for padded, _ in seen)
    assert sum(tokens for _, tokens in seen) / sum(padded for padded, _ in seen) > 0.9


def span_config(**settings: Any) -> Any:
    from tokengrain.data.config import TokenizeConfig

    return TokenizeConfig(spans={"source": "column", **settings})


def rows_with_spans(count: int = 12) -> list[dict[str, object]]:
    """Every row marks the first word of either completion, every third one nothing."""
    rows = make_rows(count)
    for i, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            end = len(str(row[side]).split()[0]) + 1
            row[f"{side}_spans"] = [{"start": 1, "end": end}] if i % 3 else []
    return rows


def test_spans_survive(tmp_path: Path) -> None:
    rows, config, output = rows_with_spans(), span_config(), tmp_path / "out.parquet"
    source = {"token_rewards": lambda batch: batch.labels.float()}
    annotate(rows, make_tokenizer(), config, source, output=output, shard_rows=5, progress=False)
    table = pq.read_table(output)
    for name in ("chosen_spans", "rejected_spans"):  # the rows' own, by character, are as they were
        assert table[name].to_pylist() == [row[name] for row in rows]
    assert read_manifest(output)["columns"] == ["token_rewards", "spans"]
    fresh = prepare_pairs(rows, make_tokenizer(), config)
    loaded = load_annotated(output, make_tokenizer())
    assert loaded.columns == ("spans", "token_rewards")
    for again, sample in zip(loaded.samples, fresh.samples, strict=True):
        for one, other in zip(again.completions, sample.completions, strict=True):
            assert list(one.columns["spans"]) == other.columns["spans"]
    marked = [sum(map(any, (c.columns["spans"] for c in s.completions))) for s in loaded.samples]
    assert marked == [0 if i % 3 == 0 else 2 for i in range(12)]
    # As ordinary data the file gives the same.
    batch = TokenBatch.from_samples(list(prepare_pairs(str(output), make_tokenizer(), config).samples[:]))
    same = TokenBatch.from_samples(list(loaded.samples[:]))
    assert torch.equal(batch.columns["spans"], same.columns["spans"])


def test_tagged_rows_are_kept_as_they_were(tmp_path: Path) -> None:
    from tokengrain.data.config import TokenizeConfig

    rows = [{"prompt": "the sea", "chosen": " was <MASK>kind</MASK>", "rejected": " was <MASK>cruel</MASK>"}]
    output = tmp_path / "out.parquet"
    source = {"token_rewards": lambda batch: torch.ones(batch.segments.total)}
    annotate(rows, make_tokenizer(), TokenizeConfig(spans="tags"), source, output=output, progress=False)
    [row] = pq.read_table(output).to_pylist()
    assert row["chosen"] == rows[0]["chosen"]
    assert row["chosen_token_spans"] == [0.0, 1.0, 0.0]
    [sample] = load_annotated(output).samples
    assert [list(c.columns["spans"]) for c in sample.completions] == [[0, 1, 0], [0, 1, 0]]


def test_spans_of_tokens_that_do_not_count(tmp_path: Path) -> None:
    chosen = Completion([3, 4, 5], [True, False, True], {"spans": [0.0, 2.0]})
    data = PairDataset([Sample([1], [chosen, Completion([6], None, {"spans": [0.0]})], row=0)])
    path = quick(tmp_path / "out.parquet", {"token_rewards": lambda batch: batch.labels.float()}, data)
    assert pq.read_table(path)["chosen_token_spans"].to_pylist() == [[0.0, 0.0, 2.0]]
    assert list(load_annotated(path)[0].completions[0].columns["spans"]) == [0.0, 2.0]


def test_rewards_of_the_data_stay_where_only_the_reference_is_asked(tmp_path: Path) -> None:
    rows = make_rows(3)
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"{side}_token_rewards"] = [{"start": 1, "end": 2, "reward": 0.5}]
    path = quick(tmp_path / "out.parquet", {}, rows, reference=lambda b, _: SimpleNamespace(logps=-b.labels.float()))
    loaded = load_annotated(path)
    assert loaded.columns == ("ref_logps", "token_rewards")
    assert [c.columns["token_rewards"][0] for s in loaded.samples for c in s.completions] == [0.5] * 6


def test_text_that_parquet_cannot_hold_is_said_before_anything_is_scored(tmp_path: Path) -> None:
    rows = [*make_rows()[:2], {**make_rows()[2], "meta": {"note": "\ud800x"}}]

    def never(batch: TokenBatch) -> torch.Tensor:
        raise AssertionError("nothing is scored")

    with pytest.raises(DataError, match=r"row 2: field 'meta': half of a surrogate pair"):
        annotate(rows, make_tokenizer(), None, {"token_rewards": never}, output=tmp_path / "a.parquet", progress=False)
