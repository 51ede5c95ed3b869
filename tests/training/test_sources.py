"""Where samples, credit and reference numbers come from: streams, functions, columns; and what is logged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from tests.training.test_trl_oracle import rows, tokenizer
from tests.training.tiny import make_samples, make_trainer, tiny_llama, weights
from tokengrain.batch import Sample, TokenBatch
from tokengrain.data.dataset import prepare_pairs
from tokengrain.data.rows import load_rows
from tokengrain.errors import DataError, RecipeError, read_log
from tokengrain.method import make_credit, make_objective
from tokengrain.scoring.score import score


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Sample]:
        yield from self.samples


SEQUENTIAL = {
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}


def test_a_stream_gives_what_rows_in_memory_give_and_resumes(tmp_path: Path) -> None:
    samples = make_samples(16)
    saving = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, **SEQUENTIAL}
    whole = make_trainer(tmp_path / "memory", samples, objective="dpo", **saving)
    whole.train()
    stream = make_trainer(tmp_path / "stream", Stream(samples), objective="dpo", max_steps=8, **saving)
    stream.train()
    resumed = make_trainer(tmp_path / "stream", Stream(samples), objective="dpo", max_steps=8, **saving)
    resumed.train(resume_from_checkpoint=tmp_path / "stream" / "checkpoint-6")
    for trainer in (stream, resumed):
        for name, value in weights(whole.model).items():
            assert torch.equal(trainer.model.state_dict()[name], value), name


def test_a_pass_over_a_stream_may_end_within_a_step(tmp_path: Path) -> None:
    """10 rows in steps of 4: the third step has the last 2 rows and the first 2 again."""
    samples = make_samples(10)
    stream = make_trainer(tmp_path / "a", Stream(samples), objective="dpo", max_steps=5, **SEQUENTIAL)
    stream.train()
    twice = make_trainer(tmp_path / "b", [*samples, *samples], objective="dpo", max_steps=5, **SEQUENTIAL)
    twice.train()
    for name, value in weights(twice.model).items():
        assert torch.equal(stream.model.state_dict()[name], value), name


def test_streams_that_cannot_be_trained_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="set max_steps"):
        make_trainer(tmp_path, Stream(make_samples(4)), objective="dpo")
    with pytest.raises(DataError, match="the stream has no rows"):
        make_trainer(tmp_path, Stream([]), objective="dpo", max_steps=2).train()


def test_rows_of_text_from_the_data_room_in_memory_and_streamed(tmp_path: Path) -> None:
    words = tokenizer()
    results = []
    for streaming in (False, True):
        trainer = make_trainer(
            tmp_path / str(streaming),
            prepare_pairs(load_rows(_jsonl(tmp_path), streaming=streaming), words),
            objective="simpo",
            eval_dataset=prepare_pairs(rows(3), words),
            processing_class=words,
            max_steps=4,
            **SEQUENTIAL,
        )
        trainer.train()
        results.append((weights(trainer.model), trainer.evaluate()["eval_loss"]))
    for name, value in results[0][0].items():
        assert torch.equal(results[1][0][name], value)
    assert results[0][1] == results[1][1]


def _jsonl(folder: Path) -> Path:
    import json

    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    return path


def test_credit_from_a_function_equals_the_same_numbers_as_a_column(tmp_path: Path) -> None:
    samples = make_samples(8)

    def longer_words_earn_more(batch: TokenBatch) -> Tensor:
        return (batch.labels.float() / 97 - 0.5).double()

    stored = make_samples(8)
    for sample in stored:
        for completion in sample.completions:
            completion.columns["token_rewards"] = [t / 97 - 0.5 for t in completion.ids]
    options: dict[str, Any] = {
        "objective": make_objective("tgdpo", alpha=0.7),
        "max_tokens_per_microbatch": 40,
    }
    first = make_trainer(tmp_path / "a", samples, credit=longer_words_earn_more, **options)
    first.train()
    second = make_trainer(tmp_path / "b", stored, **options)
    second.train()
    for name, value in weights(first.model).items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    bad = make_trainer(tmp_path / "c", samples, credit=lambda batch: torch.zeros(3), **options)
    with pytest.raises(DataError, match="wrong number of values"):
        bad.train()


def test_stored_reference_gives_the_run_of_the_live_one(tmp_path: Path) -> None:
    samples = make_samples(8)
    stored = make_samples(8)
    batch = TokenBatch.from_samples(samples)
    with torch.no_grad():
        logps = batch.segments.split(score(tiny_llama().eval(), batch).logps)
    for index, completion in enumerate(c for s in stored for c in s.completions):
        completion.columns["ref_logps"] = logps[index].tolist()
    live = make_trainer(tmp_path / "a", samples, objective="dpo")
    live.train()
    column = make_trainer(tmp_path / "b", stored, objective="dpo")
    column.train()
    ours, theirs = ([e["loss"] for e in read_log(tmp_path / d / "log.jsonl") if "loss" in e] for d in "ab")
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_trackers_see_what_the_local_log_has(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append({"step": state.global_step, **logs})

    samples = make_samples(14)
    trainer = make_trainer(
        tmp_path,
        samples,
        objective="dpo",
        logging_steps=3,
        log_entropy=True,
        callbacks=[Tracker()],
        num_train_epochs=2,
    )
    trainer.train()
    assert read_log(tmp_path / "log.jsonl") == seen
    assert [e["step"] for e in seen] == [3, 6, 8]  # the last is the summary of the run
    first = seen[0]
    # Three steps of 4 prompts; every name as in TRL, means over their 12 pairs.
    names = {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "entropy",
    }
    assert names <= first.keys()
    assert first["rewards/margins"] == pytest.approx(first["rewards/chosen"] - first["rewards/rejected"], abs=1e-7)
    order = list(iter(trainer.get_train_dataloader()))[:3]
    lengths = [len(s.completions[0].ids) for host in order for s in (samples[r] for r in host.batch.rows)]
    assert first["lengths/chosen"] == pytest.approx(sum(lengths) / 12)
    assert first["num_tokens"] == sum(host.batch.n_tokens for host in order)


def test_sft_learns_and_saves_a_model_that_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(
        tmp_path,
        make_samples(8, completions=1),
        objective="sft",
        num_train_epochs=8,
        eval_dataset=make_samples(8, completions=1),
    )
    before = trainer.evaluate()["eval_perplexity"]
    trainer.train()
    log = read_log(tmp_path / "log.jsonl")
    assert (log[0]["step"], log[0]["eval_perplexity"]) == (0, before)  # kept when training starts
    assert trainer.evaluate()["eval_perplexity"] < before / 2
    trainer.save_model(str(tmp_path / "model"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in weights(trainer.model).items():
        assert torch.equal(again.state_dict()[name], value)


def test_rows_of_text_in_a_table_of_pandas_and_in_evaluate(tmp_path: Path) -> None:
    pandas, text = pytest.importorskip("pandas"), rows(8)
    options: dict[str, Any] = {"objective": "simpo", "processing_class": tokenizer(), "max_steps": 1}
    one = make_trainer(tmp_path / "list", text, **options)
    other = make_trainer(tmp_path / "table", pandas.DataFrame(text), **options)
    assert [one.train_dataset[i] for i in range(8)] == [other.train_dataset[i] for i in range(8)]
    found, expected = one.evaluate(text[:4]), one.evaluate(prepare_pairs(text[:4], tokenizer()))
    assert found["eval_loss"] == expected["eval_loss"]
    assert found["eval_logps/chosen"] == expected["eval_logps/chosen"]


@pytest.mark.parametrize("kind", ["tensor", "array", "list"])
def test_credit_of_a_function_in_one_piece(kind: str) -> None:
    batch = TokenBatch.from_samples(make_samples(3))
    numbers = torch.arange(batch.segments.total) / 8
    made: Any = {"tensor": numbers, "array": numbers.numpy(), "list": numbers.tolist()}[kind]
    assert torch.equal(make_credit("function", function=lambda _: made)(batch), numbers)
