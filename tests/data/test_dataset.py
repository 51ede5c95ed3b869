"""Data sets: cutting to length, reports, streams, storage, and the real pairs."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.data.test_prompt_boundary import ids_of, random_rows
from tests.data.tokenizers import CHATML, gpt2_like, llama_like, unigram
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import PairDataset, SampleStore, prepare_pairs, prepare_sft
from tokengrain.data.rows import load_rows
from tokengrain.errors import DataError, RecipeError

ROW = {
    "prompt": "Question: two and two? Answer: four. Question: three and three? Answer:",
    "chosen": " six. The sky is blue.",
    "rejected": " four. The night is blacker, and the sea is green.",
}
HH = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless-pairs.jsonl.gz"


# ---- lengths


def test_long_prompts_keep_their_end_and_bos():
    for tokenizer in (llama_like(), unigram(), gpt2_like()):
        whole = prepare_pairs([ROW], tokenizer)[0]
        bos = whole.prompt_ids[:1] if whole.prompt_ids[0] == tokenizer.bos_token_id else []
        assert bool(bos) == (tokenizer is not gpt2_like())
        for limit in range(len(bos) + 1, len(whole.prompt_ids)):
            dataset = prepare_pairs([ROW], tokenizer, TokenizeConfig(max_prompt_length=limit))
            kept = dataset[0].prompt_ids
            assert kept == bos + whole.prompt_ids[len(whole.prompt_ids) - limit + len(bos) :]
            assert len(kept) == limit
            assert dataset[0].completions == whole.completions
            assert dataset.report.prompts_cut == 1
        right = TokenizeConfig(max_prompt_length=5, truncation_side="right")
        assert prepare_pairs([ROW], tokenizer, right)[0].prompt_ids == whole.prompt_ids[:5]
        enough = TokenizeConfig(max_prompt_length=len(whole.prompt_ids))
        assert prepare_pairs([ROW], tokenizer, enough).report.prompts_cut == 0


def test_long_completions_lose_their_end():
    tokenizer = gpt2_like()
    whole = prepare_pairs([ROW], tokenizer)[0]
    prompt, longest = len(whole.prompt_ids), max(len(c.ids) for c in whole.completions)
    shortest = min(len(c.ids) for c in whole.completions)
    for room in range(1, longest + 1):
        dataset = prepare_pairs([ROW], tokenizer, TokenizeConfig(max_length=prompt + room))
        for cut, full in zip(dataset[0].completions, whole.completions):
            assert cut.ids == full.ids[:room]
            assert (cut.ids[-1] == tokenizer.eos_token_id) == (len(full.ids) <= room)
        assert dataset.report.completions_cut == sum(len(c.ids) > room for c in whole.completions)
        assert dataset[0].prompt_ids == whole.prompt_ids
    assert 1 < shortest < longest


def test_a_completion_is_never_emptied():
    tokenizer = gpt2_like()
    prompt = len(prepare_pairs([ROW], tokenizer)[0].prompt_ids)
    with pytest.raises(DataError, match=rf"field 'chosen': completion does not fit beside a prompt of {prompt}"):
        prepare_pairs([ROW], tokenizer, TokenizeConfig(max_length=prompt))
    with pytest.raises(DataError, match=r"room for 3'; expected room for 4 at least.*max_prompt_length"):
        prepare_pairs([ROW], tokenizer, TokenizeConfig(max_length=prompt + 3, min_completion_length=4))
    rows = [ROW, {**ROW, "prompt": "Question:"}]
    config = TokenizeConfig(max_length=prompt, on_invalid="skip")
    dataset = prepare_pairs(rows, tokenizer, config)
    assert dataset.report.skipped == {"completion does not fit": 1}
    assert [s.row for s in dataset.samples] == [1]


def test_pairs_that_are_equal_once_cut():
    row = {"prompt": "The sky is", "chosen": " blue and green", "rejected": " blue and black"}
    prompt = len(prepare_pairs([row], gpt2_like())[0].prompt_ids)
    with pytest.raises(DataError, match=r"'rejected': is the same as 'chosen' once both are cut.*max_length"):
        prepare_pairs([row], gpt2_like(), TokenizeConfig(max_length=prompt + 2))


def test_lengths_hold_for_random_rows():
    rng = random.Random(0)
    rows = random_rows(seed=9, count=60)
    for tokenizer, _ in itertools.product((gpt2_like(), llama_like()), range(8)):
        longest = rng.randint(4, 40)
        most_prompt = rng.choice([None, rng.randint(1, longest - 2)])
        config = TokenizeConfig(max_length=longest, max_prompt_length=most_prompt, on_invalid="skip")
        try:
            dataset = prepare_pairs(rows, tokenizer, config)
        except DataError as error:
            assert "No row is left" in str(error)  # noqa: PT017
            continue
        assert dataset.report.rows == len(rows)
        for sample in dataset.samples:
            assert most_prompt is None or len(sample.prompt_ids) <= most_prompt
            assert all(1 <= len(c.ids) <= longest - len(sample.prompt_ids) for c in sample.completions)


def test_rows_longer_than_the_model():
    tokenizer = gpt2_like()
    sample = prepare_pairs([ROW], tokenizer)[0]
    lengths = [len(sample.prompt_ids) + len(c.ids) for c in sample.completions]
    longest, side = max(zip(lengths, ("chosen", "rejected")))
    assert prepare_pairs([ROW], tokenizer, model_positions=longest)[0] == sample
    message = rf"row 0: field '{side}': prompt and completion are longer than the model's positions; "
    message += rf"got .* = {longest} tokens'; expected at most {longest - 1} \(max_length"
    with pytest.raises(DataError, match=message):
        prepare_pairs([ROW], tokenizer, model_positions=longest - 1)
    cut = prepare_pairs([ROW], tokenizer, TokenizeConfig(max_length=longest - 1), model_positions=longest - 1)
    assert cut.report.completions_cut == 1
    config = TokenizeConfig(on_invalid="skip")
    short = {**ROW, "prompt": "Question:"}
    assert prepare_pairs([ROW, short], tokenizer, config, model_positions=longest - 1).report.skipped == {
        "longer than the model": 1
    }
    with pytest.raises(DataError, match="longer than the model's positions"):
        prepare_sft([ROW], tokenizer, model_positions=lengths[0] - 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_length": 1},
        {"max_length": 2.5},
        {"max_length": True},
        {"max_prompt_length": 0},
        {"min_completion_length": 0},
        {"min_completion_length": None},
        {"max_length": 8, "max_prompt_length": 8},
        {"max_length": 8, "max_prompt_length": 6, "min_completion_length": 3},
        {"truncation_side": "middle"},
        {"on_invalid": "ignore"},
    ],
)
def test_impossible_settings(wrong):
    with pytest.raises(RecipeError, match=next(reversed(wrong)) + r".*; expected|max_length 8 leaves"):
        TokenizeConfig(**wrong)


# ---- reports, storage, batches


def test_report():
    rows = [ROW, {**ROW, "chosen": ""}, {**ROW, "rejected": " "}, {**ROW, "prompt": ""}, ROW]
    with pytest.raises(DataError, match=r"row 1: field 'chosen': completion is empty.*3 of 5 rows are"):
        prepare_pairs(rows, gpt2_like())
    dataset = prepare_pairs(rows, gpt2_like(), TokenizeConfig(on_invalid="skip"))
    assert [s.row for s in dataset.samples] == [0, 4]
    assert str(dataset.report) == "2 of 5 rows; skipped: 2 empty completion, 1 empty prompt"
    assert dataset.report.first["empty completion"].startswith("list of rows: row 1: field 'chosen'")
    assert dataset[0].raw == ROW


def random_sample(rng, row):
    def completion():
        counted = [rng.random() < 0.7 for _ in range(rng.randint(1, 6))]
        counted[0] = True
        keep = None if all(counted) else counted
        columns = {name: [rng.random() for _ in range(sum(counted))] for name in ("token_rewards", "ref_logps")}
        return Completion([rng.randrange(2**31) for _ in counted], keep, columns)

    prompt = [rng.randrange(1000) for _ in range(rng.randint(1, 5))]
    return Sample(prompt, [completion(), completion()], row, {"prompt": str(row)})


def test_store_gives_back_what_was_put_in():
    rng = random.Random(1)
    samples = [random_sample(rng, i) for i in range(50)]
    dataset = PairDataset(samples)
    assert list(dataset.samples) == [dataset[i] for i in range(50)] == samples
    assert dataset[-1] == samples[-1]
    assert dataset.samples[3:5] == samples[3:5]
    assert dataset.lengths == [s.n_tokens for s in samples]
    assert dataset.report.kept == len(dataset) == 50
    with pytest.raises(IndexError):
        dataset[50]
    dataset[0].prompt_ids.append(1)
    assert dataset[0] == samples[0]


def test_fingerprint_is_that_of_the_content():
    def prints(change=lambda samples: None):
        rng = random.Random(1)
        samples = [random_sample(rng, i) for i in range(4)]
        change(samples)
        return PairDataset(samples).fingerprint

    changes = [
        lambda s: s[0].prompt_ids.append(3),
        lambda s: s[3].completions[1].ids.__setitem__(0, 7),
        lambda s: s[2].completions[0].columns["ref_logps"].__setitem__(0, 2.0),
        lambda s: s.pop(),
        lambda s: s.reverse(),
    ]
    found = [prints(), *(prints(change) for change in changes)]
    assert len(set(found)) == len(found)
    assert prints() == found[0]
    # The same tokens, cut elsewhere.
    one, other = Sample([1, 2], [Completion([3, 4])]), Sample([1, 2, 3], [Completion([4])])
    assert PairDataset([one]).fingerprint != PairDataset([other]).fingerprint


def test_store_refuses_other_columns():
    store = SampleStore()
    store.append(Sample([1], [Completion([2], None, {"token_rewards": [1.0]})]))
    for other in (Sample([1], [Completion([2])], 7), Sample([1], [Completion([2])] * 2, 7)):
        with pytest.raises(ValueError, match="sample 7 differs from the others"):
            store.append(other)
    assert len(store) == 1


def test_collate():
    samples = prepare_pairs([ROW, {**ROW, "prompt": "Question:"}], gpt2_like()).samples
    batch = TokenBatch.from_samples(list(samples))
    assert batch.is_pairs
    assert batch.rows == (0, 1)
    assert batch.raw[0]["prompt"] == ROW["prompt"]
    assert batch.prompt(1).tolist() == samples[1].prompt_ids
    assert batch.completion(3).tolist() == samples[1].completions[1].ids


def test_progress_is_shown_for_many_rows_on_a_terminal(monkeypatch, capsys):
    from tokengrain.data import dataset

    monkeypatch.setattr(dataset, "PROGRESS_ROWS", 3)
    prepare_pairs([ROW] * 4, gpt2_like())
    assert capsys.readouterr().err == "", "not a terminal"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    prepare_pairs([ROW] * 2, gpt2_like())
    assert capsys.readouterr().err == "", "too few"
    prepare_pairs([ROW] * 4, gpt2_like())
    assert "tokenising list of rows" in capsys.readouterr().err


# ---- streams


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = random_rows(seed=2, count=700)
    rows[5]["chosen"] = rows[300]["rejected"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SKIP = TokenizeConfig(on_invalid="skip", max_length=64)


def test_streams_give_the_same_samples(pairs_file):
    stored = prepare_pairs(pairs_file, gpt2_like(), SKIP)
    stream = prepare_pairs(load_rows(pairs_file, streaming=True), gpt2_like(), SKIP)
    assert list(stream) == list(stored.samples) == list(stream)
    assert stream.report == stored.report
    assert stream.report.skipped["empty completion"] == 2
    other = prepare_pairs(load_rows(pairs_file, streaming=True), llama_like(), SKIP)
    assert stream.fingerprint != other.fingerprint


def test_streams_read_as_they_go():
    read = []

    class Counting:
        def __iter__(self):
            for row in itertools.cycle(random_rows(seed=2, count=10)):
                read.append(row)
                yield row

    from tokengrain.data.rows import RowStream

    stream = iter(prepare_pairs(RowStream("endless", Counting(), lambda: "0"), gpt2_like(), SKIP))
    for _ in range(50):
        next(stream)
    assert 50 <= len(read) <= 512


def test_streams_resume(pairs_file):
    stream = prepare_pairs(load_rows(pairs_file, streaming=True), gpt2_like(), SKIP)
    whole = list(stream)
    for stop in (0, 1, 256, 299, 400, len(whole)):
        before = list(itertools.islice(stream, stop))
        state = stream.state_dict() if stop else {"next_row": 0}
        again = prepare_pairs(load_rows(pairs_file, streaming=True), gpt2_like(), SKIP)
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert before + list(again) == whole
        assert list(again) == whole, "the next epoch begins at the front"


def test_streams_are_dealt_out(pairs_file):
    stream = prepare_pairs(load_rows(pairs_file, streaming=True), gpt2_like(), SKIP)
    whole = [s.row for s in stream]
    shards = [[s.row for s in stream.shard(rank, 3)] for rank in range(3)]
    assert sorted(itertools.chain(*shards)) == whole
    assert all(row % 3 == rank for rank, shard in enumerate(shards) for row in shard)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(s.row for s in loader) == whole
    with pytest.raises(ValueError, match="rank is 3, expected 0 to 2"):
        stream.shard(3, 3)


def test_streams_name_the_bad_row(pairs_file):
    stream = iter(prepare_pairs(load_rows(pairs_file, streaming=True), gpt2_like()))
    assert [next(stream).row for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=r"pairs\.jsonl: row 5 \(line 6\): field 'chosen': completion"):
        next(stream)


def test_stream_without_a_good_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "chosen": "", "rejected": "b"}\n' * 3)
    stream = prepare_pairs(load_rows(tmp_path / "a.jsonl", streaming=True), gpt2_like(), SKIP)
    with pytest.raises(DataError, match=r"row 0 \(line 1\).*No row is left: 3 empty completion"):
        list(stream)


def test_sft_streams(pairs_file):
    stream = prepare_sft(load_rows(pairs_file, streaming=True), gpt2_like(), SKIP)
    assert list(stream) == list(prepare_sft(pairs_file, gpt2_like(), SKIP).samples)


# ---- the real pairs


@pytest.mark.skipif(not HH.exists(), reason="shared data is not here")
def test_hh_pairs():
    torch.set_num_threads(1)
    tokenizer = gpt2_like(trim=False)
    rows = load_rows(HH)
    assert len(rows) == 1800
    with pytest.raises(DataError, match=r"row 86 \(line 87\): field 'chosen': completion is empty; got ' '"):
        prepare_pairs(rows.subset(range(100)), tokenizer)
    dataset = prepare_pairs(rows, tokenizer, TokenizeConfig(on_invalid="skip"))
    assert dataset.report.kept == 1794
    assert dataset.report.skipped == {"empty completion": 4, "different prompts": 2}
    raw = dict(rows)
    for sample in dataset.samples[::50]:
        assert sample.raw["prompt"].endswith("\n\nAssistant:")
        for side, completion in zip(("chosen", "rejected"), sample.completions):
            assert sample.raw["prompt"] + sample.raw[side] == raw[sample.row][side]
            ids = sample.prompt_ids + completion.ids
            assert ids == [*ids_of(tokenizer, raw[sample.row][side]), tokenizer.eos_token_id]


def test_messages_and_text_in_one_file():
    """Rows of both kinds may stand side by side; each is read by its own."""
    chat = {
        "prompt": [{"role": "user", "content": "the sky?"}],
        "chosen": [{"role": "assistant", "content": "blue"}],
        "rejected": [{"role": "assistant", "content": "black"}],
    }
    both = prepare_pairs([ROW, chat], gpt2_like(CHATML))
    assert both[0] == prepare_pairs([ROW], gpt2_like())[0]
    assert both[1].completions == prepare_pairs([chat], gpt2_like(CHATML))[0].completions
