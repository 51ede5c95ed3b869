"""Sources of rows, whole and damaged."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.tokenizers import words
from tokengrain.data import rows as rows_module
from tokengrain.data.dataset import prepare_pairs
from tokengrain.data.rows import load_rows, split_rows
from tokengrain.errors import DataError

ROWS = [{"prompt": f"The sky {i}", "chosen": f' is "blue", {i}\nand naïve', "rejected": " is 黒い"} for i in range(7)]


def write(path: Path, rows=ROWS) -> Path:
    """`rows` in the format that the name of `path` says."""
    opener = gzip.open if path.suffix == ".gz" else open
    kind = path.name.removesuffix(".gz").rsplit(".")[-1]
    if kind == "parquet":
        with opener(path, "wb") as file:
            pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
        return path
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        elif kind == "json":
            json.dump(rows, file, indent=2)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def error_of(source, **kwargs):
    """The message that loading gives, with and without streaming; they must be the same."""
    with pytest.raises(DataError) as caught:
        load_rows(source, **kwargs)
    with pytest.raises(DataError) as streamed:
        list(load_rows(source, streaming=True, **kwargs))
    assert str(streamed.value) == str(caught.value)
    return str(caught.value)


NAMES = ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.parquet"]


@pytest.mark.parametrize("name", NAMES + [n + ".gz" for n in NAMES])
@pytest.mark.parametrize("chunk", [5, 1 << 20])
def test_formats(tmp_path, name, chunk, monkeypatch):
    monkeypatch.setattr(rows_module, "CHUNK", chunk)
    path = write(tmp_path / name)
    rows = load_rows(str(path))
    assert list(rows) == list(enumerate(ROWS))
    assert len(rows) == 7
    assert rows.name == str(path)
    stream = load_rows(path, streaming=True)
    assert list(stream) == list(stream) == list(enumerate(ROWS))
    assert stream.fingerprint == rows.fingerprint
    assert not hasattr(stream, "__len__")


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_lines_under_the_name_json(tmp_path, bom):
    path = tmp_path / "a.json"
    path.write_bytes(bom + b"\n" + b"\n".join(json.dumps(r).encode() for r in ROWS))
    assert [row for _, row in load_rows(path)] == ROWS
    path.write_bytes(bom + json.dumps(ROWS).encode())
    assert [row for _, row in load_rows(path)] == ROWS


def test_rows_know_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(r) for r in ROWS]
    path.write_text("\n".join([lines[0], "", lines[1], lines[2], "", "", lines[3]]))
    rows = load_rows(path)
    assert [rows.place(n)[1] for n in range(4)] == ["0 (line 1)", "1 (line 3)", "2 (line 4)", "3 (line 7)"]
    write(tmp_path / "b.csv")
    rows = load_rows(tmp_path)
    assert [n for n, _ in rows] == list(range(11))
    assert rows.place(3) == (str(path), "3 (line 7)")
    assert rows.place(4) == (str(tmp_path / "b.csv"), "0")
    assert rows.place(10) == (str(tmp_path / "b.csv"), "6")
    stream = load_rows(tmp_path, streaming=True)
    for _ in range(2):
        assert [stream.place(n) for n, _ in stream] == [rows.place(n) for n in range(11)]
    assert stream._places._marks == rows._places._marks, "reading again does not grow what is remembered"


def test_the_line_of_a_row_in_an_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}\n]\n')
    rows = load_rows(path)
    assert [rows.place(n)[1] for n in range(3)] == ["0 (line 2)", "1 (line 4)", "2 (line 5)"]


def test_streams_do_not_read_ahead(tmp_path):
    """The damage at the end of the file is met only by who reads that far."""
    path = write(tmp_path / "a.jsonl", ROWS * 2000)
    with open(path, "a") as file:
        file.write("{broken\n")
    rows = iter(load_rows(path, streaming=True))
    assert [next(rows) for _ in range(5)] == list(enumerate(ROWS))[:5]
    with pytest.raises(DataError, match="malformed JSON at line 14001"):
        list(rows)


# ---- folders, splits


def test_folder_with_splits(tmp_path):
    write(tmp_path / "train-00000.parquet", ROWS[:2])
    write(tmp_path / "train-00001.parquet", ROWS[2:5])
    write(tmp_path / "test.jsonl", ROWS[5:])
    (tmp_path / "notes.txt").write_text("not rows")
    assert [row for _, row in load_rows(tmp_path)] == ROWS[:5]
    assert [row for _, row in load_rows(tmp_path, split="test")] == ROWS[5:]
    assert "there is no such split; got 'dev'; expected one of test, train" in error_of(tmp_path, split="dev")
    (tmp_path / "train-00000.parquet").unlink()
    (tmp_path / "train-00001.parquet").rename(tmp_path / "validation.parquet")
    assert "which split is meant is not clear" in error_of(tmp_path)


def labels(source, split=None):
    return sorted({row["prompt"] for _, row in load_rows(source, split=split)})


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, [{"prompt": name.partition("-")[0].partition(".")[0], "chosen": "a", "rejected": "b"}])


def test_splits_that_begin_alike(tmp_path):
    kinds = ("train_prefs", "train_sft", "test_prefs", "test_sft")
    fill(tmp_path, *(f"{kind}-0000{part}-of-00002.parquet" for kind in kinds for part in range(2)))
    assert labels(tmp_path, "train_prefs") == ["train_prefs"]
    assert len(load_rows(tmp_path, split="train_prefs")) == 2
    for split in (None, "train"):
        message = error_of(tmp_path, split=split)
        assert f"which split is meant is not clear; got {split!r}; expected one of train_prefs, train_sft" in message
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(
        (tmp_path / "train_sft-00000-of-00002.parquet").read_bytes()
    )
    assert labels(tmp_path) == labels(tmp_path, "train") == ["train_sft"], "the split of just that name"


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["my_train.jsonl", "my_test.jsonl"], None, ["my_train"]),
        (["train0.json", "train1.json", "dev.json"], None, ["train0", "train1"]),
        (["train.csv", "dev.csv"], "validation", ["dev"]),
        (["part-00000.jsonl", "part-00001.jsonl"], None, ["part"]),
        (["a.jsonl", "b.jsonl"], None, ["a", "b"]),
        (["default/train/0000.parquet", "default/test/0000.parquet"], None, ["default/train/0000"]),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], None, ["data/train"]),
        (["train/0.jsonl", "test/0.jsonl"], None, ["train/0"]),
        (["train/0.jsonl", "test/0.jsonl"], "test", ["test/0"]),
        (["default/train.jsonl", "default/test.jsonl"], "test", ["default/test"]),
    ],
)
def test_folders_as_datasets_reads_them(tmp_path, names, split, found):
    fill(tmp_path, *names)
    assert labels(tmp_path, split) == found


def test_subfolders_that_are_no_splits_are_no_choice(tmp_path):
    fill(tmp_path, "main/train.jsonl", "socratic/train.jsonl")
    assert "which of the subfolders is meant is not clear; got ['main', 'socratic']" in error_of(tmp_path)


def test_the_header_of_a_hub_clone_says_which_files(tmp_path):
    fill(tmp_path, "main/train-00000.jsonl", "other/train.jsonl", "main/test-00000.jsonl", "main/more.jsonl")
    files = [{"split": "train", "path": "main/train-*"}, {"split": "prefs", "path": ["main/more.jsonl"]}]
    configs = [{"config_name": "default", "data_files": files}, {"config_name": "b", "data_files": "other/*"}]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n# Rows\n")
    assert labels(tmp_path) == ["main/train"]
    assert labels(tmp_path, "prefs") == ["main/more"]
    assert "expected one of train, prefs" in error_of(tmp_path, split="test")
    for header in ("license: [", "configs: [{config_name: default, data_files: /elsewhere/*.jsonl}]"):
        (tmp_path / "README.md").write_text(f"---\n{header}\n---\n")
        assert "which of the subfolders" in error_of(tmp_path)


def test_the_same_file_in_two_formats(tmp_path):
    fill(tmp_path, "x.jsonl", "x.jsonl.gz")
    assert "the same rows may be there twice; got ['x.jsonl', 'x.jsonl.gz']" in error_of(tmp_path)
    (tmp_path / "x.jsonl.gz").unlink()
    fill(tmp_path, "x.parquet")
    assert "the same rows may be there twice" in error_of(tmp_path)
    assert "the same rows may be there twice" in error_of(str(tmp_path / "x.*"))


def test_patterns(tmp_path):
    fill(tmp_path, "a/train-0.jsonl", "a/train-1.jsonl", "a/test-0.jsonl", "b/train-2.jsonl")
    assert labels(f"{tmp_path}/a/train-*.jsonl") == ["a/train"]
    assert len(load_rows(f"{tmp_path}/**/train-?.jsonl")) == 3
    assert len(load_rows(f"{tmp_path}/a/*.jsonl", split="test")) == 1
    assert "no file matches the pattern" in error_of(f"{tmp_path}/*.csv")


def test_a_folder_with_the_registry_of_another_tool(tmp_path):
    write(tmp_path / "mine.jsonl")
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.jsonl"}}')
    assert [row for _, row in load_rows(tmp_path)] == ROWS
    (tmp_path / "state.json").write_text("{}")
    assert "is not what datasets' save_to_disk writes" in error_of(tmp_path)


def test_several_sources_with_weights(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:2])
    write(tmp_path / "b.jsonl", ROWS[2:6])
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    both = load_rows([a, b])
    assert [row for _, row in both] == ROWS[:6]
    assert both.place(3) == (b, "1 (line 2)")
    weighted = load_rows({a: 2, b: 0.5})
    rows = [row for _, row in weighted]
    assert rows[:4] == ROWS[:2] * 2
    assert len(rows) == 6
    assert all(row in ROWS[2:6] for row in rows[4:])
    assert list(load_rows({a: 2, b: 0.5})) == list(weighted)
    assert len({load_rows(source).fingerprint for source in (a, [a, b], {a: 2, b: 1}, {a: 1, b: 2})}) == 4
    _, held_out = split_rows(both, 0.5, seed=1)
    assert all(held_out.place(n)[0] == (a if n < 2 else b) for n, _ in held_out)
    with pytest.raises(DataError, match="has an unusable weight; got 0"):
        load_rows({a: 0})
    with pytest.raises(DataError, match="several sources cannot be streamed"):
        load_rows([a, b], streaming=True)


def test_folder_without_rows(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert "the folder holds no file of rows" in error_of(tmp_path)


def test_saved_dataset(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    assert [row for _, row in load_rows(tmp_path / "d")] == ROWS
    assert [row for _, row in load_rows(tmp_path / "d", streaming=True)] == ROWS


def test_split_of_a_file(tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert len(load_rows(path, split="train")) == 7
    assert "a single file has no splits; got 'test'" in error_of(path, split="test")


# ---- Python objects


def test_objects():
    dataset = datasets.Dataset.from_list(ROWS)
    stream = dataset.to_iterable_dataset()
    for source in (ROWS, tuple(ROWS), dataset, stream, datasets.DatasetDict({"train": dataset})):
        assert list(load_rows(source)) == list(enumerate(ROWS))
        assert load_rows(source).streaming == (source is stream)
    assert load_rows(dataset, streaming=True).streaming
    assert load_rows(dataset).fingerprint == load_rows(datasets.Dataset.from_list(ROWS)).fingerprint
    assert load_rows(dataset).fingerprint != load_rows(dataset.select(range(6))).fingerprint
    both = datasets.DatasetDict({"a": dataset, "b": dataset.select([0])})
    assert len(load_rows(both, split="b")) == 1
    with pytest.raises(DataError, match="expected one of a, b"):
        load_rows(both)
    rows = load_rows(ROWS)
    assert load_rows(rows) is rows


@pytest.mark.parametrize("source", [3, None, b"bytes", {"prompt": ["a"]}])
def test_not_a_source(source):
    with pytest.raises(DataError, match="not a source of rows"):
        load_rows(source)


def test_list_has_no_splits():
    with pytest.raises(DataError, match="a list of rows has no splits; got 'test'"):
        load_rows(ROWS, split="test")


# ---- hub names


def test_hub_name(monkeypatch):
    asked = []

    def load_dataset(name, split=None, streaming=False):
        asked.append((name, split, streaming))
        dataset = datasets.Dataset.from_list(ROWS)
        return datasets.DatasetDict({"train": dataset, "test": dataset}) if split is None else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows("someone/pairs")) == 7
    assert len(load_rows("someone/pairs", split="test[:7]")) == 7
    assert asked == [("someone/pairs", None, False), ("someone/pairs", "test[:7]", False)]


def test_hub_name_that_cannot_be_had(monkeypatch):
    def load_dataset(name, **kwargs):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = r"^someone/pairs: is neither a local file or folder nor .* hub.*ConnectionError: offline mode"
    with pytest.raises(DataError, match=text):
        load_rows("someone/pairs")


def test_missing_file(tmp_path):
    write(tmp_path / "pairs.jsonl")
    message = error_of(tmp_path / "piars.jsonl")
    assert "there is no such file or folder; expected perhaps" in message
    assert "pairs.jsonl" in message
    for name in ("nowhere/at/all", "nowhere.csv", "./nowhere", "world://stories"):
        assert "there is no such file or folder" in error_of(name)


# ---- damage


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet"])
def test_empty(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(b""))
    else:
        path.write_bytes(b"")
    assert error_of(path) == f"{path}: there are no rows; expected at least one row"


def test_empty_objects(tmp_path):
    (tmp_path / "a.json").write_text(" [ ] ")
    assert "there are no rows" in error_of(tmp_path / "a.json")
    (tmp_path / "a.csv").write_text("prompt,chosen\n")
    assert "there are no rows" in error_of(tmp_path / "a.csv")
    for source in ([], datasets.Dataset.from_list([])):
        with pytest.raises(DataError, match="there are no rows"):
            load_rows(source)


def test_malformed_json_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2,, "b": 3}\n')
    message = error_of(path)
    assert message.startswith(f"{path}: row 1: malformed JSON at line 3, column 9: ")
    assert 'got \'{"a": 2,, "b": 3}\\n\'; expected one JSON object per row' in message


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[\n{"a": 1},\n{"a": 2,, "b": 3}]', "row 1: malformed JSON at line 3, column 9"),
        ('[{"a": 1}\n {"a": 2}]', "row 1: malformed JSON at line 2, column 2: expected ',' or ']'"),
        ('[{"a": 1},\n {"a": "x', "row 1: malformed JSON at line 2, column 8: Unterminated"),
        ('[{"a": 1},\n', "row 1: malformed JSON at line 2, column 1: the array is not closed"),
        ('[{"a": 1}\n', "row 1: malformed JSON at line 2, column 1: the array is not closed"),
        ('[{"a": 1}] [', "row 1: malformed JSON at line 1, column 12: text behind the end"),
        ('[\n{"a": "é\n"}]', "row 0: malformed JSON at line 2, column 9: Invalid control character"),
    ],
)
def test_malformed_array(tmp_path, text, where, chunk, monkeypatch):
    monkeypatch.setattr(rows_module, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    assert error_of(path).startswith(f"{path}: {where}")


def test_deeply_nested_json(tmp_path):
    for name, text in (("a.jsonl", "[" * 200_000), ("a.json", '[{"a":' + "[" * 200_000)):
        (tmp_path / name).write_text(text)
        assert "row 0: malformed JSON at line 1" in error_of(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_broken_utf8(tmp_path, name, chunk, monkeypatch):
    monkeypatch.setattr(rows_module, "CHUNK", chunk)
    whole = write(tmp_path / name)
    data = gzip.decompress(whole.read_bytes()) if name.endswith(".gz") else whole.read_bytes()
    at = data.rindex(b"The sky 3") + 4
    data = data[:at] + b"\xff" + data[at + 1 :]
    line = data[:at].count(b"\n") + 1
    whole.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert error_of(whole).startswith(f"{whole}: broken UTF-8 at byte {at} (line {line}): ")


def test_broken_utf8_in_parquet(tmp_path):
    values = pa.array([b"fine", b"also fine", b"not \xff fine"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    pq.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
    message = error_of(tmp_path / "a.parquet")
    assert "a.parquet: row 2: field 'prompt': broken UTF-8 at byte 4" in message


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.parquet.gz"])
def test_truncated_gzip(tmp_path, name):
    path = write(tmp_path / name, ROWS * 50)
    path.write_bytes(path.read_bytes()[:-9])
    message = error_of(path)
    assert message.startswith(f"{path}: gzip file is truncated")
    assert "expected a complete gzip file" in message


def test_damaged_gzip(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", ROWS * 50)
    data = bytearray(path.read_bytes())
    data[-5] ^= 0xFF
    path.write_bytes(data)
    assert "gzip file is damaged" in error_of(path)
    path.write_text("not gzip at all")
    assert "gzip file is damaged" in error_of(path)


def test_damaged_parquet(tmp_path):
    path = write(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    assert error_of(path).startswith(f"{path}: damaged parquet file: ")


def test_damaged_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n1,2,3\n")
    assert error_of(path) == (
        f"{path}: row 1 (line 3): row has another number of fields than the header; got 3; expected 2 (a, b)"
    )
    path.write_text('a,b\n1,"open\n')
    assert "malformed CSV: unexpected end of data" in error_of(path)
    path.write_text("a,a\n1,2\n")
    assert "column name is repeated in the header; got 'a'" in error_of(path)


def test_csv_fields_may_be_long(tmp_path):
    long = "word " * 100_000
    path = write(tmp_path / "a.csv", [{**ROWS[0], "chosen": long}])
    assert next(iter(load_rows(path)))[1]["chosen"] == long


def test_unreadable(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("x")
    assert "is not of a known format; got '.tsv'; expected .jsonl, .json, .csv, .parquet or .ts" in error_of(path)


def test_rows_that_are_not_objects(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n[1, 2]\n")
    with pytest.raises(DataError, match=r"a\.jsonl: row 1 \(line 2\): the row is not an object; got"):
        prepare_pairs(path, words())


# ---- split_rows


def test_split_rows():
    rows = [{"n": i} for i in range(100)]
    train, held_out = split_rows(rows, 0.1, seed=3)
    assert (len(train), len(held_out)) == (90, 10)
    both = sorted([*train, *held_out], key=lambda pair: pair[0])
    assert both == list(enumerate(rows)), "rows keep their numbers, and none is lost or doubled"
    assert [n for n, _ in train] == sorted(n for n, _ in train)
    again = split_rows(load_rows(rows), 0.1, seed=3)
    assert [list(part) for part in again] == [list(train), list(held_out)]
    assert list(split_rows(rows, 0.1, seed=4)[1]) != list(held_out)
    assert len({train.fingerprint, held_out.fingerprint, load_rows(rows).fingerprint}) == 3
    assert again[0].fingerprint == train.fingerprint
    assert [len(part) for part in split_rows(rows, 0.001, seed=0)] == [99, 1]
    assert [len(part) for part in split_rows(rows, 0.999, seed=0)] == [1, 99]
    inner, _ = split_rows(train, 0.5, seed=0)
    assert set(dict(inner)) < set(dict(train))


def test_split_keeps_places(tmp_path):
    _, held_out = split_rows(load_rows(write(tmp_path / "a.jsonl")), 0.3, seed=0)
    for number, _ in held_out:
        assert held_out.place(number) == (str(tmp_path / "a.jsonl"), f"{number} (line {number + 1})")


def test_what_cannot_be_split(tmp_path):
    for fraction in (0, 1, -0.1, 1.5):
        with pytest.raises(DataError, match="eval_fraction is out of range"):
            split_rows(ROWS, fraction, seed=0)
    with pytest.raises(DataError, match="too few rows to split; got 1; expected at least 2 rows, or eval_fraction 0"):
        split_rows(ROWS[:1], 0.5, seed=0)
    with pytest.raises(DataError, match="a streamed set cannot be split"):
        split_rows(load_rows(write(tmp_path / "a.csv"), streaming=True), 0.5, seed=0)


@pytest.mark.parametrize("chunk", [16, 1 << 20])
def test_numbers_too_long_for_python(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(rows_module, "CHUNK", chunk)
    row = '{"n": ' + "1" * 5000 + "}"
    for name, text in (("a.jsonl", f'{{"n": 1}}\n{row}\n'), ("a.json", f'[{{"n": 1}}, {row}]')):
        (tmp_path / name).write_text(text)
        assert "row 1: malformed JSON" in error_of(tmp_path / name)
        assert "5000 digits" in error_of(tmp_path / name)


def test_a_named_split_beside_other_files_is_no_choice(tmp_path):
    write(tmp_path / "pairs.jsonl")
    write(tmp_path / "test.jsonl", ROWS[:1])
    message = error_of(tmp_path)
    assert "which files are meant is not clear: 'pairs.jsonl' belongs to no split" in message
    assert "split: test" in message
    assert len(load_rows(tmp_path, split="test")) == 1
    (tmp_path / "pairs.jsonl").unlink()
    assert len(load_rows(tmp_path)) == 1, "the only split"
    write(tmp_path / "train.jsonl")
    write(tmp_path / "notes.json")
    assert len(load_rows(tmp_path)) == len(ROWS), "train, whatever lies beside it"


# ---- LLaMA-Factory's dataset_info.json

SHARED = {
    "formatting": "sharegpt",
    "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
    "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "H", "assistant_tag": "A"},
}
SETS = {
    "plain": {"file_name": "plain.jsonl", "ranking": True},
    "alpaca": {
        "file_name": "alpaca.jsonl",
        "columns": {"prompt": "q", "query": "more", "chosen": "good", "rejected": "bad", "system": "rules"},
    },
    "talks": {"file_name": "talks.jsonl", "ranking": True, **SHARED},
    "images": {"file_name": "plain.jsonl", "columns": {"images": "pictures"}},
    "elsewhere": {"hf_hub_url": "a/b"},
}


def llama_factory(folder: Path) -> Path:
    said = [{"who": "H", "said": "the sky?"}]
    good, bad = ({"who": "A", "said": text} for text in ("It is blue.", "It is black."))
    write(folder / "plain.jsonl")
    alpaca = {"q": "the sky?", "more": "today", "good": good["said"], "bad": bad["said"], "rules": "Be kind."}
    write(folder / "alpaca.jsonl", [alpaca | {"instruction": "not this one"}])
    write(folder / "talks.jsonl", [{"talk": said, "good": good, "bad": bad}])
    (folder / "dataset_info.json").write_text(json.dumps(SETS))
    return folder


def test_llama_factorys_sets_and_columns(tmp_path):
    folder = llama_factory(tmp_path)
    assert list(load_rows(folder, split="plain")) == list(enumerate(ROWS))
    tokenizer = words(template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    pairs = [prepare_pairs(load_rows(folder, split=name), tokenizer)[0].raw for name in ("alpaca", "talks")]
    answers = {"chosen": [{"role": "assistant", "content": "It is blue."}]}
    for raw, start, asked in zip(pairs, (1, 0), ("the sky?\ntoday", "the sky?")):
        assert raw["prompt"][start:] == [{"role": "user", "content": asked}]
        assert raw["chosen"] == answers["chosen"]
    assert pairs[0]["prompt"][0] == {"role": "system", "content": "Be kind."}
    with pytest.raises(DataError, match=r"which split is meant is not clear.*plain, alpaca, talks, images"):
        load_rows(folder)
    with pytest.raises(DataError, match=r"'images' of dataset_info.json has \['images'\]"):
        load_rows(folder, split="images")
    (folder / "dataset_info.json").write_text(json.dumps({"talks": {**SETS["talks"], "columns": {"messages": "x"}}}))
    with pytest.raises(DataError, match=r"field 'x': dataset_info\.json names a column that is missing"):
        prepare_pairs(load_rows(folder), tokenizer)
    assert load_rows(folder).fingerprint != load_rows(folder / "talks.jsonl").fingerprint
    (folder / "dataset_info.json").write_text(json.dumps({"talks": {**SETS["talks"], "columns": ["x"]}}))
    with pytest.raises(DataError, match=r"'talks' of dataset_info\.json: columns is no object of names; got \['x'\]"):
        load_rows(folder)


def test_files_of_no_split_are_those_to_train_on(tmp_path):
    """As `datasets` has it."""
    write(tmp_path / "rows.jsonl")
    assert list(load_rows(tmp_path, split="train")) == list(enumerate(ROWS))
    with pytest.raises(DataError, match="there is no such split; got 'test'"):
        load_rows(tmp_path, split="test")


def test_a_row_that_comes_several_times_is_never_on_both_sides(tmp_path):
    names = [str(write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(6)])) for name in "ab"]
    rows = load_rows({names[0]: 3, names[1]: 0.5})
    assert len(rows) == 21
    train, held_out = split_rows(rows, 0.4, seed=1)
    texts = [[row["text"] for _, row in part] for part in (train, held_out)]
    assert not set(texts[0]) & set(texts[1])
    assert len(texts[1]) == len(set(texts[1])) == 4
    assert 3 * 2 <= len(texts[0]) <= 21 - 4  # the weight of what is left counts
