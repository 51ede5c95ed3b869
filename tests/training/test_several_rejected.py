"""One chosen completion against several rejected ones: what the pairs give as rows of their own, scored once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.scoring.encdec import tiny_seq2seq
from tests.scoring.models import gradients, tiny
from tests.training.tiny import make_samples, make_trainer, weights
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.data.dataset import PairDataset
from tokengrain.errors import DataError, read_log
from tokengrain.loss import make_normaliser
from tokengrain.method import make_objective
from tokengrain.scoring.reference import FrozenReference
from tokengrain.training.step import PreferenceLoss, counts_of, resolve_credit

VOCABULARY = 61
OBJECTIVES = (
    "dpo",
    "ddro",
    "simpo",
    "tdpo1",
    "tdpo2",
    "tgdpo",
    "ti_dpo",
    "tis_dpo",
    "treg",
    "treg_simpo",
    "rrpo",
    "sepo",
)
MODELS = {
    "causal": lambda seed: tiny("llama", initializer_range=0.3 - 0.1 * seed),
    "seq2seq": lambda seed: tiny_seq2seq("bart", seed=seed),
}


def rows(columns: tuple[str, ...] = ("token_rewards",)) -> list[Sample]:
    """Two prompts, with three rejected completions and with one."""
    samples = make_samples(2, completions=4, columns=columns)
    samples[1] = replace(samples[1], completions=samples[1].completions[:2])
    return [
        replace(
            s,
            prompt_ids=[i % VOCABULARY for i in s.prompt_ids],
            completions=[replace(c, ids=[i % VOCABULARY for i in c.ids]) for c in s.completions],
        )
        for s in samples
    ]


def as_pairs(samples: list[Sample]) -> list[Sample]:
    """The same pairs, a row each."""
    return [replace(s, completions=[s.completions[0], other]) for s in samples for other in s.completions[1:]]


def judged(model: Any, reference: Any, samples: list[Sample], name: str, measure: Any = ()) -> tuple[Any, TokenBatch]:
    objective = make_objective(name)
    credit = {"sepo": "column", "rrpo": "column"}.get(name)
    use = resolve_credit(credit, None, objective, ("token_rewards",)) if credit else None
    batch = TokenBatch.from_samples(samples)
    return PreferenceLoss(objective, FrozenReference(reference), use)(model, batch, measure=measure), batch


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_pairs_in_rows_of_their_own(name, kind):
    found = []
    columns = [("token_rewards",)]
    samples = rows(*columns)
    if name == "ti_dpo":  # importances are at least 0
        samples = [
            replace(
                s,
                completions=[
                    replace(c, columns={"token_rewards": [abs(v) for v in c.columns["token_rewards"]]})
                    for c in s.completions
                ],
            )
            for s in samples
        ]
    for given in (samples, as_pairs(samples)):
        model, reference = MODELS[kind](0), MODELS[kind](1)
        result, batch = judged(model, reference, given, name)
        loss = make_normaliser("mean")(result.output, counts_of(batch))
        found.append((result, loss, gradients(model, {"loss": loss})))
    (several, loss, grads), (pairs, expected, expected_grads) = found
    torch.testing.assert_close(several.output.losses, pairs.output.losses, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    for key, value in pairs.output.metrics.items():
        torch.testing.assert_close(
            several.output.metrics[key], value, rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    assert max(float((grads[n] - expected_grads[n]).abs().max()) for n in grads) < 1e-6 * scale


def test_a_chosen_completion_is_scored_once():
    model, batch = tiny_seq2seq("t5"), TokenBatch.from_samples(rows())
    assert batch.pairs is not None
    assert batch.pairs.completions.tolist() == [0, 1, 0, 2, 0, 3, 4, 5]
    result, _ = judged(model, tiny_seq2seq("t5", seed=1), rows(), "dpo", ("entropy", "log_ratio"))
    assert result.entropy.shape == result.log_ratio.shape == (batch.segments.total,)
    assert result.output.losses.shape == (4,)


def test_counts_lengths_and_rows():
    samples = rows()
    batch = TokenBatch.from_samples(samples)
    counts = counts_of(batch)
    lengths = [[len(c.ids) for c in s.completions] for s in samples]
    assert (counts.pairs, counts.completions, counts.prompts) == (4, 6, 2)
    assert counts.chosen_tokens == 3 * lengths[0][0] + lengths[1][0]
    assert counts.tokens == sum(map(sum, lengths))


@pytest.mark.parametrize("objective", ["dpo", "tgdpo", "tdpo2"])
def test_training_is_that_of_pairs_in_rows_of_their_own(objective, tmp_path):
    """However the step is cut; and a log and an evaluation that count pairs."""
    samples = make_samples(6, completions=3, columns=("token_rewards",))
    found = []
    for name, given, size, most in (("a", samples, 3, None), ("b", samples, 3, 40), ("c", as_pairs(samples), 6, None)):
        options: dict[str, Any] = {
            "optim": "sgd",
            "per_device_train_batch_size": size,
            "max_tokens_per_microbatch": most,
        }
        options["data_seed"], options["train_sampling_strategy"] = 1, "sequential"
        trainer = make_trainer(tmp_path / name, given, objective=objective, eval_dataset=given, **options)
        trainer.train()
        metrics = {
            k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_rewards/margins", "eval_accuracy")
        }
        found.append((weights(trainer.model), metrics, read_log(tmp_path / name / "log.jsonl")))
    for other in found[:2]:
        for key, value in found[2][0].items():
            torch.testing.assert_close(other[0][key], value, rtol=1e-4, atol=1e-6)
        assert other[1] == pytest.approx(found[2][1], rel=1e-4)
        assert other[2][0]["rewards/margins"] == pytest.approx(found[2][2][0]["rewards/margins"], rel=1e-4, abs=1e-7)


def test_data_sets_hold_rows_with_any_number_of_rejected_completions():
    samples = rows()
    dataset = PairDataset(samples)
    assert [dataset[i] for i in range(2)] == samples
    assert dataset.lengths == [s.n_tokens for s in samples]
    assert dataset.fingerprint != PairDataset(as_pairs(samples)).fingerprint
    with pytest.raises(ValueError, match="differs from the others"):
        PairDataset([*samples, Sample([1], [Completion([2], columns={"token_rewards": [0.0]})])])
    with pytest.raises(DataError, match="chosen and rejected cannot be swapped"):
        len(dataset.swapped())
