"""`Segments` and `TokenBatch`: reductions, holes, padding, selection, micro-batches, errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import tokengrain
from tokengrain.batch import Completion, Sample, Segments, TokenBatch
from tokengrain.data.dataset import SampleStore
from tokengrain.rollout.sampler import PromptItem
from tokengrain.training.buffer import RolloutBuffer, concatenate
from tokengrain.vision import Vision, collate, seen

LENGTHS = [3, 0, 2, 4, 0]


def _segments() -> Segments:
    return Segments.from_lengths(LENGTHS)


def _values(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(sum(LENGTHS), dtype=dtype, generator=torch.Generator().manual_seed(0))


def _sample(row: int, prompt: int, *lengths: int, holes: bool = False) -> Sample:
    """Distinct ids everywhere: row * 100 + position; with holes every second token does not count."""
    completions = []
    for c, length in enumerate(lengths):
        ids = [1000 * (row + 1) + 100 * c + t for t in range(length)]
        counted = [t % 2 == 0 for t in range(length)] if holes else None
        n = sum(counted) if counted else length
        columns = {"token_rewards": [row + c / 10 + t / 100 for t in range(n)]}
        completions.append(Completion(ids, counted, columns))
    return Sample([row] * prompt, completions, row=f"r{row}", raw={"n": row})


class TestSegments:
    def test_sum_mean_max_match_a_loop_and_empty_segments_are_neutral(self) -> None:
        segments, values = _segments(), _values()
        parts = values.split(LENGTHS)
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(segments.sum(values), torch.stack([p.sum() for p in parts]))
        means = torch.stack([p.mean() if len(p) else zero for p in parts])
        torch.testing.assert_close(segments.mean(values), means)
        largest = torch.stack([p.max() if len(p) else zero - torch.inf for p in parts])
        assert torch.equal(segments.max(values), largest)

    def test_gradients_of_the_reductions(self) -> None:
        segments, values = _segments(), _values().requires_grad_()
        for reduce in (segments.sum, segments.mean):
            assert torch.autograd.gradcheck(reduce, values)
        # The empty segments' -inf has no part in the gradient of the others.
        (grad,) = torch.autograd.grad(segments.max(values)[[0, 2, 3]].sum(), values)
        assert grad.sum() == 3
        assert torch.isfinite(grad).all()

    def test_ids_broadcast_split_pairs(self) -> None:
        segments = Segments.from_lengths([2, 1, 0, 3])
        assert segments.ids.tolist() == [0, 0, 1, 3, 3, 3]
        assert segments.broadcast(torch.tensor([5, 6, 7, 8])).tolist() == [5, 5, 6, 8, 8, 8]
        assert [len(p) for p in segments.split(torch.arange(6))] == [2, 1, 0, 3]
        chosen, rejected = segments.pairs(torch.tensor([1, 2, 3, 4]))
        assert chosen.tolist() == [1, 3]
        assert rejected.tolist() == [2, 4]
        assert segments.is_chosen.tolist() == [True, True, False, False, False, False]
        assert segments.total == 6
        assert len(segments) == 4

    def test_values_with_more_dimensions(self) -> None:
        segments, values = _segments(), torch.randn(9, 5)
        torch.testing.assert_close(segments.sum(values)[3], values[5:9].sum(0))
        assert segments.broadcast(torch.randn(5, 2)).shape == (9, 2)

    def test_an_odd_number_of_completions_is_no_batch_of_pairs(self) -> None:
        with pytest.raises(ValueError, match="even number of completions, got 5"):
            _segments().pairs(torch.zeros(5))

    def test_a_vector_of_another_length_is_refused(self) -> None:
        for method in ("sum", "mean", "max", "split"):
            with pytest.raises(ValueError, match="flat vector has 8 tokens, expected 9"):
                getattr(_segments(), method)(torch.zeros(8))

    def test_no_segments_at_all(self) -> None:
        segments = Segments.from_lengths([])
        assert segments.sum(torch.zeros(0)).shape == (0,)
        assert segments.to_padded(torch.zeros(0))[0].shape == (0, 0)


class TestPadding:
    def test_round_trip(self) -> None:
        segments, values = _segments(), _values()
        padded, mask = segments.to_padded(values, fill=-7.0)
        assert padded.shape == mask.shape == (5, 4)
        assert torch.equal(padded == -7.0, ~mask)
        flat, back = Segments.from_padded(padded, mask)
        assert torch.equal(flat, values)
        assert torch.equal(back.offsets, segments.offsets)

    def test_round_trip_with_a_vocabulary_dimension(self) -> None:
        segments, values = _segments(), torch.randn(9, 6)
        padded, mask = segments.to_padded(values)
        assert padded.shape == (5, 4, 6)
        assert torch.equal(Segments.from_padded(padded, mask)[0], values)

    @pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
    def test_masked_places_are_never_read(self, garbage: float) -> None:
        mask = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]])  # left padding, holes, an empty row
        values = torch.full((3, 4), garbage, dtype=torch.float64)
        values[mask.bool()] = torch.arange(5, dtype=torch.float64)
        values.requires_grad_()
        flat, segments = Segments.from_padded(values, mask)
        assert flat.tolist() == [0, 1, 2, 3, 4]
        assert segments.lengths.tolist() == [2, 3, 0]
        (grad,) = torch.autograd.grad((segments.mean(flat) ** 2).sum(), values)
        assert torch.equal(grad[~mask.bool()], torch.zeros(7, dtype=torch.float64))
        assert torch.isfinite(grad).all()

    def test_float_masks_are_masks(self) -> None:
        mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        assert Segments.from_padded(torch.ones(2, 2), mask)[1].lengths.tolist() == [1, 2]


class TestTokenBatch:
    def test_collation(self) -> None:
        batch = TokenBatch.from_samples([_sample(0, 2, 3, 1), _sample(1, 1, 2, 2)])
        assert batch.prompt(1).tolist() == [1]
        assert batch.completion(2).tolist() == [2000, 2001]
        assert batch.group.tolist() == [0, 0, 1, 1]
        assert (batch.n_prompts, batch.n_completions, batch.n_tokens) == (2, 4, 11)
        assert batch.segments.lengths.tolist() == [3, 1, 2, 2]
        assert batch.rows == ("r0", "r1")
        assert batch.is_pairs
        torch.testing.assert_close(batch.columns["token_rewards"][3:5], torch.tensor([0.1, 1.0]))

    def test_holes_are_context_but_not_in_the_flat_vectors(self) -> None:
        batch = TokenBatch.from_samples([_sample(0, 2, 5, 2, holes=True)])
        assert batch.completion(0).tolist() == [1000, 1001, 1002, 1003, 1004]
        assert batch.labels.tolist() == [1000, 1002, 1004, 1100]
        assert batch.segments.lengths.tolist() == [3, 1]
        assert len(batch.columns["token_rewards"]) == 4

    def test_groups_of_any_size_and_an_encoder_prompt(self) -> None:
        batch = TokenBatch.from_samples([_sample(0, 2, 1, 2, 3), _sample(1, 2, 4)], prompt_role="encoder")
        assert batch.group.tolist() == [0, 0, 0, 1]
        assert not batch.is_pairs
        assert batch.select([1]).prompt_role == "encoder"

    def test_a_completion_without_counted_tokens(self) -> None:
        empty = Completion([7, 8], [False, False], {"token_rewards": []})
        full = Completion([9], None, {"token_rewards": [0.5]})
        batch = TokenBatch.from_samples([Sample([1], [full, empty])])
        assert batch.segments.lengths.tolist() == [1, 0]
        assert batch.segments.sum(batch.columns["token_rewards"]).tolist() == [0.5, 0.0]

    @pytest.mark.parametrize("holes", [False, True])
    def test_select_equals_collating_the_selected_samples(self, holes: bool) -> None:
        samples = [_sample(i, i + 1, 3, i + 1, holes=holes) for i in range(4)]
        picked = TokenBatch.from_samples(samples).select([3, 0, 2])
        expected = TokenBatch.from_samples([samples[i] for i in (3, 0, 2)])
        for name in (
            "prompt_ids",
            "prompt_offsets",
            "completion_ids",
            "completion_offsets",
            "counted",
            "group",
        ):
            assert torch.equal(getattr(picked, name), getattr(expected, name)), name
        assert torch.equal(picked.columns["token_rewards"], expected.columns["token_rewards"])
        assert picked.rows == expected.rows
        assert picked.raw == expected.raw

    def test_select_takes_all_completions_of_a_group(self) -> None:
        batch = TokenBatch.from_samples([_sample(0, 1, 2), _sample(1, 2, 1, 2, 3), _sample(2, 1, 1, 1)])
        assert batch.select([1]).segments.lengths.tolist() == [1, 2, 3]

    @pytest.mark.parametrize(("max_tokens", "parts"), [(12, 1), (20, 3), (None, 4), (5, 2), (1000, 1)])
    def test_split_keeps_every_prompt_once_and_the_budget(self, max_tokens: int | None, parts: int) -> None:
        samples = [_sample(i, 1 + i % 4, 2 + i % 5, 1 + i % 3) for i in range(9)]
        batch = TokenBatch.from_samples(samples)
        pieces = batch.split(max_tokens, parts)
        assert len(pieces) >= parts
        assert sorted(r for p in pieces for r in p.rows) == sorted(batch.rows)
        assert sum(p.n_tokens for p in pieces) == batch.n_tokens
        if max_tokens is not None:
            assert all(p.n_tokens <= max_tokens or p.n_prompts == 1 for p in pieces)

    def test_split_without_a_budget_is_the_batch(self) -> None:
        batch = TokenBatch.from_samples([_sample(0, 1, 2)])
        assert batch.split(None) == [batch]

    def test_with_columns_and_to(self) -> None:
        batch = TokenBatch.from_samples([_sample(0, 2, 3, 1)])
        more = batch.with_columns(ref_logps=torch.zeros(4), ref_hidden=torch.zeros(4, 8))
        assert set(more.columns) == {"token_rewards", "ref_logps", "ref_hidden"}
        assert set(batch.columns) == {"token_rewards"}
        assert more.select([0]).columns["ref_hidden"].shape == (4, 8)
        moved = more.to("cpu")
        assert moved.device.type == "cpu"
        assert torch.equal(moved.labels, batch.labels)
        with pytest.raises(ValueError, match="column 'x' has 3 tokens, expected 4"):
            batch.with_columns(x=torch.zeros(3))

    def test_padded_columns_round_trip(self) -> None:
        batch = TokenBatch.from_samples([_sample(0, 2, 5, 2, holes=True), _sample(1, 1, 1, 3)])
        padded, mask = batch.to_padded(batch.columns["token_rewards"], fill=float("nan"))
        flat, segments = Segments.from_padded(padded, mask)
        assert torch.equal(flat, batch.columns["token_rewards"])
        assert torch.equal(segments.offsets, batch.segments.offsets)

    def test_errors_name_the_row_and_the_column(self) -> None:
        with pytest.raises(ValueError, match="at least one sample"):
            TokenBatch.from_samples([])
        short = Sample([1], [Completion([1, 2], None, {"ref_logps": [0.1]})], row="a7")
        with pytest.raises(ValueError, match=r"row a7: column 'ref_logps' has 1 values, expected 2"):
            TokenBatch.from_samples([short])
        mixed = Sample([1], [Completion([1], None, {"ref_logps": [0.1]}), Completion([2])], row=5)
        with pytest.raises(ValueError, match="row 5: column 'ref_logps' is missing in one completion"):
            TokenBatch.from_samples([mixed])


def test_counted_must_have_one_entry_per_token() -> None:
    """Else the tokens of one completion would be counted in the next one."""
    shifted = [Completion([5, 6, 7], [True, False]), Completion([8], [True, True])]
    with pytest.raises(ValueError, match="row r3: `counted` has 2 entries, expected 3"):
        TokenBatch.from_samples([Sample([1], shifted, row="r3")])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_values_are_added_up_in_float32(dtype: torch.dtype) -> None:
    segments = Segments.from_lengths([1000, 601])
    values = torch.full((1601,), 100.0, dtype=dtype).requires_grad_()
    means = segments.mean(values)
    assert means.dtype == dtype
    assert means.tolist() == [100.0, 100.0]
    assert torch.equal(segments.sum(values / 100).detach(), torch.tensor([1000.0, 601.0]).to(dtype))
    (grad,) = torch.autograd.grad(means.float().sum(), values)
    torch.testing.assert_close(grad, (1 / segments.broadcast(segments.lengths)).to(dtype))


class TestVision:
    """What a prompt shows goes wherever the prompt goes."""

    def _vision(self, seed: int, height: int) -> Vision:
        return Vision({"pixel_values": torch.full((1, 3, height, 4), float(seed))}, None, 9, patches=7)

    def _samples(self) -> list[Sample]:
        samples = [_sample(i, 3, 2, 4) for i in range(4)]
        for i in (0, 1, 3):
            samples[i].vision = self._vision(i, i + 1)
        return samples

    def test_it_follows_its_prompt(self) -> None:
        samples = self._samples()
        given = [s.vision for s in samples]
        batch = TokenBatch.from_samples(samples)
        assert list(batch.vision) == given
        assert list(batch.select([3, 2, 0]).vision) == [given[3], None, given[0]]
        assert list(batch.narrow(torch.zeros(24, dtype=torch.bool)).vision) == given
        parts = batch.split(20)
        assert len(parts) > 1
        by_row = dict(zip(batch.rows, given, strict=True))
        assert all(part.vision == tuple(by_row[row] for row in part.rows) for part in parts)
        again = batch.with_endings([[1]] * 8, [[2]] * 4)
        assert list(again.vision) == given
        assert [batch.sample(i).vision for i in range(4)] == given
        assert [s.again([]).vision for s in samples] == given
        joined = concatenate([batch.select([2]), batch.select([1, 2, 0])])
        assert list(joined.vision) == [None, given[1], None, given[0]]
        store = SampleStore()
        for sample in samples:
            store.append(sample)
        assert [s.vision for s in store] == given
        moved = batch.to("cpu").vision[3]
        assert moved is not None
        assert torch.equal(moved.inputs["pixel_values"], torch.full((1, 3, 4, 4), 3.0))
        assert TokenBatch.from_samples([samples[2]]).vision == ()

    def test_a_prompt_is_as_large_as_its_patches(self) -> None:
        samples = self._samples()
        assert samples[0].n_tokens == 3 + 6 + 7
        assert [len(part.rows) for part in TokenBatch.from_samples(samples).split(16)] == [1, 1, 1, 1]

    def test_a_rollout_keeps_it_in_its_checkpoint(self, tmp_path: Path) -> None:
        item = PromptItem([5, 6, 7], row=4, vision=Vision({"pixel_values": torch.ones(2, 3)}, torch.ones(3, 3), 2))
        longer = item.then([8, 9], "4/branch").vision
        assert longer is not None
        assert longer.positions is not None
        assert longer.positions.tolist() == [[1, 1, 1, 2, 3]] * 3
        assert longer.next == 4
        batch = TokenBatch.from_samples([item.sample([Completion([1, 2])]), Sample([5], [Completion([1])], row=5)])
        RolloutBuffer(batch, batch.select([1]), minibatches=1, epochs=1, seed=0).save(tmp_path / "buffer.pt")
        back = next(RolloutBuffer.load([tmp_path / "buffer.pt"], 0, 1, {})).batch.vision
        assert back[1] is None
        assert item.vision is not None
        assert back[0] is not None
        assert seen(back[0]) == seen(item.vision)
        assert back[0].next == 2

    def test_collated_inputs_are_padded_with_zeros(self) -> None:
        video = Vision({"pixel_values_videos": torch.ones(1, 2)})
        joined = collate([self._vision(1, 2), self._vision(2, 4), video])
        assert joined["pixel_values"].shape == (2, 3, 4, 4)
        assert joined["pixel_values"].sum((1, 2, 3)).tolist() == [1 * 3 * 2 * 4, 2 * 3 * 4 * 4]
        assert joined["pixel_values_videos"].shape == (1, 2)

    def test_samples_are_made_where_rows_become_tokens(self) -> None:
        """Everywhere else a sample is made from another, by `again`, `sample` or `then`, which keep the vision."""
        source = Path(tokengrain.__file__).parent
        making = re.compile(r"(?<!Credit)\b(Sample|PromptItem)\(")
        found = {str(p.relative_to(source)) for p in source.rglob("*.py") if making.search(p.read_text("utf-8"))}
        from_rows = {"data/dataset.py", "data/encode.py", "rollout/sampler.py", "annotation.py", "run/trained.py"}
        worlds = {f"worlds/{name}.py" for name in ("arithmetic", "library", "stories")}
        # Another text in the prompt's place: a probe's, an instruction, a reward model's.
        of_text = {"scoring/prepare.py", "methods/treg.py", "methods/_other_tokens.py", "rewards/reward_model.py"}
        assert found == {"batch.py"} | from_rows | worlds | of_text
