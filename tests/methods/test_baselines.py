"""Credit sources: baselines and controls, guides, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.credit.small import llama, pairs, tokenizer
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import DataError, RecipeError
from tokengrain.method import CREDIT, BoundCredit, Transformed, make_credit
from tokengrain.scoring.reference import ColumnReference, FrozenReference, model_fingerprint
from tokengrain.scoring.score import score


@pytest.fixture
def batch() -> TokenBatch:
    return pairs(tokenizer())


class TestGuide:
    def test_is_beta_times_the_log_ratio(self, batch: TokenBatch) -> None:
        guide, reference = llama(1), llama(2)
        credit = make_credit("guide", model=guide, reference=FrozenReference(reference), beta=0.3)(batch)
        expected = 0.3 * (score(guide, batch).logps - score(reference, batch).logps)
        torch.testing.assert_close(credit, expected.detach())
        assert not credit.requires_grad

    def test_guide_equal_to_reference_gives_zero(self, batch: TokenBatch) -> None:
        credit = make_credit("guide", model=llama(1), reference=llama(1))(batch)
        assert torch.equal(credit, torch.zeros_like(credit))

    def test_cached_reference_gives_the_same(self, batch: TokenBatch) -> None:
        guide, reference = llama(1), llama(2)
        live = make_credit("guide", model=guide, reference=reference)(batch)
        stored = batch.with_columns(ref_logps=score(reference, batch).logps.detach())
        cached = make_credit("guide", model=guide, reference=ColumnReference())(stored)
        torch.testing.assert_close(cached, live)

    def test_fingerprint(self) -> None:
        def of(guide: int = 1, reference: int = 2, beta: float = 0.1) -> str:
            return make_credit("guide", model=llama(guide), reference=llama(reference), beta=beta).fingerprint()

        assert of() == of()
        assert len({of(), of(guide=3), of(reference=3), of(beta=0.2)}) == 4


def test_model_fingerprint_sees_every_weight_and_the_config() -> None:
    model = llama()
    before = model_fingerprint(model)
    assert model_fingerprint(llama()) == before
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1e-12
    assert model_fingerprint(model) != before
    assert model_fingerprint(llama(positions=64)) != before
    assert model_fingerprint(llama().float()) != before


class TestColumn:
    def test_reads_the_column(self, batch: TokenBatch) -> None:
        values = torch.randn(batch.segments.total)
        assert torch.equal(make_credit("column")(batch.with_columns(token_rewards=values)), values)
        assert torch.equal(make_credit("column", column="mine")(batch.with_columns(mine=values)), values)

    def test_missing_column(self, batch: TokenBatch) -> None:
        with pytest.raises(DataError, match=r"no per-token column 'token_rewards'.*chosen_token_rewards"):
            make_credit("column")(batch)


def _per_token(batch: TokenBatch) -> Tensor:
    return torch.arange(batch.segments.total)


def _per_completion(batch: TokenBatch) -> list[list[float]]:
    return [[float(c)] * n for c, n in enumerate(batch.segments.lengths.tolist())]


class TestFunction:
    def test_tensor_or_lists(self, batch: TokenBatch) -> None:
        flat = make_credit("function", function=_per_token)(batch)
        assert flat.dtype == torch.float32
        assert torch.equal(flat, torch.arange(batch.segments.total).float())
        lists = make_credit("function", function=_per_completion)(batch)
        assert torch.equal(lists, batch.segments.ids.float())

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda b: torch.zeros(3), r"wrong number of values; got \(3,\); expected \(31,\)"),
            (lambda b: torch.zeros(31, 2), r"got \(31, 2\)"),
            (lambda b: [[0.0]], "wrong number of completions; got 1; expected 4"),
            (
                lambda b: [[0.0] * (n - (i == 3)) for i, n in enumerate(b.segments.lengths.tolist())],
                "row r1: .*for completion 1; got 9; expected 10",
            ),
            (
                lambda b: torch.where(torch.arange(31) == 16, torch.nan, 0.0),
                "row r1: .*not finite for token 2 of completion 0; got nan",
            ),
            (lambda b: torch.full((31,), -torch.inf), "row r0: .*token 0 of completion 0; got -inf"),
            (lambda b: [["a"] * n for n in b.segments.lengths.tolist()], "not numbers"),
            (lambda b: None, "not numbers"),
        ],
    )
    def test_wrong_results_name_the_row(
        self, batch: TokenBatch, function: Callable[[TokenBatch], Any], message: str
    ) -> None:
        with pytest.raises(DataError, match=message):
            make_credit("function", function=function)(batch)

    def test_import_string(self, batch: TokenBatch, tmp_path: Path) -> None:
        file = tmp_path / "mine.py"
        file.write_text("import torch\ndef ones(batch):\n    return torch.ones(batch.segments.total)\n")
        source = make_credit("function", function=f"{file}:ones")
        assert torch.equal(source(batch), torch.ones(31))
        assert source.name == "function ones"
        file.write_text("import torch\ndef ones(batch):\n    return -torch.ones(batch.segments.total)\n")
        assert make_credit("function", function=f"{file}:ones").fingerprint() != source.fingerprint()
        with pytest.raises(RecipeError, match="no callable 'one'"):
            make_credit("function", function=f"{file}:one")
        with pytest.raises(RecipeError, match="function = 3"):
            make_credit("function", function=3)

    def test_a_modules_own_import_error_is_not_hidden(self, tmp_path: Path) -> None:
        file = tmp_path / "broken.py"
        file.write_text("import there_is_no_such_module\n")
        with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
            make_credit("function", function=f"{file}:f")


class TestRandom:
    def test_does_not_depend_on_the_batch(self, batch: TokenBatch) -> None:
        source = make_credit("random", seed=3)
        whole = source(batch)
        alone = source(batch.select([1]))
        assert torch.equal(batch.select([1]).segments.split(alone)[1], batch.segments.split(whole)[3])
        assert torch.equal(source(batch), whole)
        assert not torch.equal(make_credit("random", seed=4)(batch), whole)
        assert make_credit("random", seed=4).fingerprint() != source.fingerprint()

    def test_bounds_and_spread(self) -> None:
        completions = [Completion([5] * 2000), Completion([5] * 2000)]
        long = TokenBatch.from_samples([Sample([1], completions)])
        credit = make_credit("random", low=-1.0, high=3.0)(long)
        assert -1 <= credit.min() < -0.9
        assert 2.9 < credit.max() <= 3
        assert abs(float(credit.mean()) - 1) < 0.1
        assert not torch.equal(credit[:2000], credit[2000:])

    def test_bounds_must_be_ordered(self) -> None:
        with pytest.raises(RecipeError, match="low < high"):
            make_credit("random", low=1.0, high=1.0)


def test_transformed(batch: TokenBatch) -> None:
    source = make_credit("random")
    plain = source(batch)
    scaled = Transformed(source, scale=-2.0, clip=0.6)
    assert torch.equal(scaled(batch), (-2 * plain).clamp(-0.6, 0.6))
    assert scaled.name == "random"
    assert scaled.fingerprint() != source.fingerprint()
    assert isinstance(make_credit("random", scale=1.0), BoundCredit)
    assert torch.equal(make_credit("random", scale=-1)(batch), -plain)


class TestRegistry:
    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            ("gude", {}, "unknown credit 'gude'; did you mean 'guide'"),
            ("guide", {"betta": 0.1}, "unknown setting 'betta'; did you mean 'beta'"),
            ("guide", {"beta": -0.1}, "beta = -0.1: .*greater than 0"),
            ("random", {"seed": "x"}, "seed = 'x': .*valid integer"),
            ("random", {"clip": 0}, "clip = 0: .*greater than 0"),
            ("contrastive", {"templates": "maths2"}, "unknown templates 'maths2'"),
            ("contrastive", {"chat": "perhaps"}, "chat = 'perhaps'"),
            ("function", {}, "setting 'function' is missing"),
        ],
    )
    def test_settings_are_checked_before_anything_is_loaded(
        self, name: str, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RecipeError, match=message):
            CREDIT.find(name).settings(settings)

    def test_objects(self) -> None:
        assert CREDIT["guide"].objects == {"model", "reference"}
        assert CREDIT["contrastive"].objects == {"model", "tokenizer"}
        assert CREDIT["column"].objects == set()
        with pytest.raises(RecipeError, match="credit 'guide' needs reference"):
            make_credit("guide", model=llama())
        with pytest.raises(RecipeError, match="credit 'column' takes no model"):
            make_credit("column", model=llama())
        assert CREDIT["guide"].settings({"beta": 1}) == {"beta": 1.0, "scale": 1.0, "clip": None}


@pytest.fixture
def uneven() -> TokenBatch:
    return pairs(tokenizer(), holes=True)


def test_contrastive_dpo_is_the_difference_of_two_guides(uneven: TokenBatch) -> None:
    normal, reverse, reference = llama(1), llama(2), llama(3)
    found = make_credit("contrastive_dpo", model=normal, reverse=FrozenReference(reverse), beta=0.3)(uneven)
    guides = [make_credit("guide", model=m, reference=reference, beta=0.3)(uneven) for m in (normal, reverse)]
    torch.testing.assert_close(found, guides[0] - guides[1])
    assert not found.requires_grad
    assert torch.equal(make_credit("contrastive_dpo", model=normal, reverse=llama(1))(uneven), torch.zeros_like(found))


class TestTDPO:
    def test_equals_the_formula_with_all_logits(self, uneven: TokenBatch) -> None:
        model, reference = llama(1), llama(2)
        found = make_credit("tdpo", model=model, reference=reference, beta=0.2)(uneven)
        assert found.shape == (uneven.segments.total,)
        # By hand, for the last token of the first completion.
        ids = torch.cat([uneven.prompt(0), uneven.completion(0)])[None]
        with torch.no_grad():
            logp, logq = (m(ids).logits[0, -2].log_softmax(-1) for m in (model, reference))
        expected = 0.2 * (logp - logq)[ids[0, -1]] + 0.2 * (logq.exp() * (logq - logp)).sum()
        assert found[int(uneven.segments.offsets[1]) - 1].item() == pytest.approx(expected.item(), rel=1e-9)

    def test_mean_over_the_references_tokens_is_zero(self) -> None:
        model, reference = llama(1), llama(2)
        prompt, vocabulary = [1, 5, 6], model.config.vocab_size
        every = TokenBatch.from_samples([Sample(prompt, [Completion([v]) for v in range(vocabulary)])])
        credit = make_credit("tdpo", model=model, reference=reference)(every)
        q = score(reference, every).logps.exp()
        assert float((q * credit).sum()) == pytest.approx(0, abs=1e-12)
        assert float(credit.abs().max()) > 1e-3

    def test_models_called_like_references_give_the_same(self, uneven: TokenBatch) -> None:
        model, reference = llama(1), llama(2)
        plain = make_credit("tdpo", model=model, reference=reference)(uneven)
        wrapped = make_credit("tdpo", model=FrozenReference(model), reference=FrozenReference(reference))(uneven)
        torch.testing.assert_close(wrapped, plain)

    def test_a_model_that_did_not_move_gives_zero(self, uneven: TokenBatch) -> None:
        credit = make_credit("tdpo", model=llama(1), reference=llama(1))(uneven)
        torch.testing.assert_close(credit, torch.zeros_like(credit), atol=1e-12, rtol=0)


def test_surprise_and_entropy_read_the_models_distribution(uneven: TokenBatch) -> None:
    model = llama(4).train()
    scores = score(llama(4), uneven, ("logps", "entropy"))
    for scorer in (model, FrozenReference(llama(4))):
        torch.testing.assert_close(make_credit("surprise", model=scorer)(uneven), scores.logps.detach())
        torch.testing.assert_close(make_credit("entropy", model=scorer)(uneven), scores.entropy.detach())
    assert model.training
    assert not make_credit("entropy", model=model)(uneven).requires_grad


@pytest.mark.parametrize("holes", [False, True])
def test_lookahead_reads_the_next_token_with_and_without_this_one(holes: bool) -> None:
    batch, model = pairs(tokenizer(), holes=holes), llama(4)
    parts = []
    for c, group in enumerate(batch.group.tolist()):
        prompt, ids = batch.prompt(group).tolist(), batch.completion(c).tolist()
        start, end = batch.completion_offsets[c : c + 2].tolist()
        counted = batch.counted[start:end].tolist()

        def logp(token: int, before: list[int]) -> float:
            with torch.no_grad():
                return float(model(torch.tensor([before])).logits[0, -1].log_softmax(-1)[token])

        for place in (place for place, counts in enumerate(counted) if counts):
            before, token = [*prompt, *ids[:place]], ids[place]
            seen = place + 1 < len(ids) and counted[place + 1]
            following = ids[place + 1] if seen else 0
            after = (logp(following, [*before, token]), logp(following, before)) if seen else (0.0, 0.0)
            parts.append((logp(token, before), *after))
    now, following, without = torch.tensor(parts, dtype=torch.float64).unbind(1)
    for omitted in (0.0, 0.5, 1.0):
        found = make_credit("lookahead", model=model, omitted=omitted)(batch)
        torch.testing.assert_close(found, now + following - omitted * without)
        assert not found.requires_grad
    kept = make_credit("lookahead", model=FrozenReference(model))(batch)
    torch.testing.assert_close(kept, now + following - 0.5 * without)


def test_fingerprints_tell_settings_and_weights_apart() -> None:
    found = [
        make_credit("contrastive_dpo", model=llama(1), reverse=llama(2)),
        make_credit("contrastive_dpo", model=llama(1), reverse=llama(3)),
        make_credit("contrastive_dpo", model=llama(1), reverse=llama(2), beta=0.2),
        make_credit("tdpo", model=llama(1), reference=llama(2)),
        make_credit("tdpo", model=llama(3), reference=llama(2)),
        make_credit("surprise", model=llama(1)),
        make_credit("surprise", model=llama(2)),
        make_credit("entropy", model=llama(1)),
        make_credit("lookahead", model=llama(1)),
        make_credit("lookahead", model=llama(1), omitted=0),
    ]
    assert len({source.fingerprint() for source in found}) == len(found)
    assert make_credit("surprise", model=llama(1)).fingerprint() == found[5].fingerprint()
