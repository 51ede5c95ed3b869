"""The corruption test: what is changed, how credit is judged, and the command line on rows and a tiny llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.credit.small import llama, tokenizer
from tokengrain.batch import Completion, Sample, Segments, TokenBatch
from tokengrain.bench.cli import bench_app
from tokengrain.bench.corruption import MEASURES, bench_corruption, chance_top1, corruption_test, surroundings
from tokengrain.corruption import corrupt, self_check
from tokengrain.errors import DataError, RecipeError, read_json, write_json
from tokengrain.evaluation.credit import added_auc, auc
from tokengrain.method import make_credit

TEXTS = [
    ("write about the sea :", "the sea was calm and deep and the sun was not cruel ."),
    ("write about the sun :", "the sun was deep and calm . the sea was not cruel ."),
    ("write about the sea in sun :", "sun and sea was the calm and deep sun in the sea ."),
    ("write :", "calm sea , deep sun and the sea was not in the sun ."),
]
HOWS = ("random", "unlikely", "swap")


def answers(*, holes: bool = False) -> TokenBatch:
    tok = tokenizer()
    samples = []
    for row, (prompt, answer) in enumerate(TEXTS):
        ids = [*tok(answer, add_special_tokens=False)["input_ids"], tok.eos_token_id]
        counted = [not holes or i % 5 != 1 for i in range(len(ids))]
        raw = {"prompt": prompt, "chosen": answer}
        samples.append(Sample(tok(prompt)["input_ids"], [Completion(ids, counted)], row=row, raw=raw))
    return TokenBatch.from_samples(samples)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("holes", [False, True])
def test_only_marked_places_change(how: Any, holes: bool) -> None:
    batch, tok = answers(holes=holes), tokenizer()
    found = corrupt(batch, tok, how=how, tokens=2, model=llama(1))
    assert found.clean.n_prompts == batch.n_prompts
    assert torch.equal(found.clean.labels, batch.labels)
    assert torch.equal(found.clean.labels != found.corrupted.labels, found.marked)
    outside = ~batch.counted
    assert torch.equal(batch.completion_ids[outside], found.corrupted.completion_ids[outside])
    for marked, ids in zip(*(batch.segments.split(x) for x in (found.marked, found.corrupted.labels)), strict=True):
        assert 1 <= int(marked.sum()) <= (4 if how == "swap" else 2)
        assert not marked[ids == tok.eos_token_id].any()
        assert how == "swap" or holes or not (marked[1:] & marked[:-1]).any()
    assert all(set(raw) == {"prompt"} for raw in found.corrupted.raw)
    again = corrupt(batch, tok, how=how, tokens=2, model=llama(1))
    assert torch.equal(again.corrupted.labels, found.corrupted.labels)
    other = corrupt(batch, tok, how=how, tokens=2, model=llama(1), seed=1)
    assert not torch.equal(other.corrupted.labels, found.corrupted.labels)


def test_a_swap_exchanges_neighbours() -> None:
    batch = answers()
    found = corrupt(batch, tokenizer(), how="swap", tokens=1)
    for i in range(batch.n_prompts):
        before, after = batch.completion(i).tolist(), found.corrupted.completion(i).tolist()
        (first, second) = [p for p in range(len(before)) if before[p] != after[p]]
        assert second == first + 1
        assert [before[first], before[second]] == [after[second], after[first]]


def test_an_answer_without_two_words_is_left_out_of_a_swap() -> None:
    tok, batch = tokenizer(), answers()
    one = Sample(tok("write :")["input_ids"], [Completion([tok.eos_token_id])], row="one")
    samples = [one, *(batch.sample(i, [Completion(batch.completion(i).tolist())]) for i in range(2))]
    found = corrupt(TokenBatch.from_samples(samples), tok, how="swap")
    assert found.left_out == 1
    assert found.clean.rows == batch.rows[:2]


def test_unlikely_tokens_are_less_likely_than_random_ones() -> None:
    batch, model = answers(), llama(1).float()
    surprise = []
    for how in ("random", "unlikely"):
        total = 0.0
        for seed in range(12):
            found = corrupt(batch, tokenizer(), how=how, tokens=1, seed=seed, model=model)
            total += float(make_credit("surprise", model=model)(found.corrupted)[found.marked].mean())
        surprise.append(total / 12)
    assert surprise[1] < surprise[0]


def test_credit_that_knows_the_corruption_is_perfect_and_none_is_at_chance() -> None:
    found = corrupt(answers(), tokenizer(), tokens=2)

    def knows(batch: TokenBatch) -> torch.Tensor:
        """−1 where a token differs from the clean text, by row."""
        out = []
        for i in range(batch.n_prompts):
            row = list(found.clean.rows).index(batch.rows[i])
            out.append(-(batch.completion(i) != found.clean.completion(row)).float())
        return torch.cat(out) + 0.001 * torch.arange(len(batch.labels)).remainder(2)

    entries, credit = corruption_test(
        {"knows": knows, "flipped": lambda b: -knows(b), "constant": lambda b: torch.zeros(len(b.labels))}, found
    )
    right, wrong, none = (e["measures"] for e in entries)
    for name in ("auc", "auc_neighbours", "auc_elsewhere", "top1", "topk"):
        assert (right[name]["mean"], right[name]["low"]) == (1, 1), name
        assert wrong[name]["mean"] == 0, name
        chance = 0.5 if name.startswith("auc") else chance_top1(found)
        assert none[name]["mean"] == pytest.approx(chance), name
    assert right["drop"]["mean"] == pytest.approx(1 / entries[0]["deviation"], rel=1e-4)
    assert right["drop_neighbours"]["mean"] == right["drop_elsewhere"]["mean"] == 0
    assert none["drop"]["mean"] is None
    assert set(right) == set(MEASURES)
    assert credit["knows"][0].shape == found.marked.shape


def test_neighbours_are_reported_apart() -> None:
    """A source that is startled after the fault: it falls at the next token, not at the fault."""
    found = corrupt(answers(), tokenizer(), tokens=1)
    near, later = surroundings(found, neighbours=1)

    def startled(batch: TokenBatch) -> torch.Tensor:
        is_corrupted = not torch.equal(batch.labels, _clean_of(batch).labels)
        part = _part_of(batch)
        return torch.where(near[part], -1.0, 0.0) if is_corrupted else torch.linspace(-1, 1, len(batch.labels))

    def _part_of(batch: TokenBatch) -> torch.Tensor:
        rows = torch.tensor([found.clean.rows.index(r) for r in batch.rows])
        return torch.isin(found.clean.segments.ids, rows)

    def _clean_of(batch: TokenBatch) -> TokenBatch:
        return found.clean.select([found.clean.rows.index(r) for r in batch.rows])

    entries, _ = corruption_test({"startled": startled}, found, neighbours=1)
    measures = entries[0]["measures"]
    assert measures["auc_neighbours"]["mean"] == 0
    assert measures["auc_elsewhere"]["mean"] == 0.5
    assert measures["auc"]["mean"] < 0.5
    assert measures["top1"]["mean"] == 0
    assert not (near & later).any()
    assert not ((near | later) & found.marked).any()


def test_random_credit_does_not_fall_anywhere() -> None:
    found = corrupt(answers(), tokenizer(), tokens=2)
    entries, _ = corruption_test({"random": make_credit("random")}, found)
    assert entries[0]["measures"]["drop"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "answers": 4}
    assert entries[0]["passes"] == 0


def test_a_self_check_says_which_way_credit_points() -> None:
    samples = [answers().sample(i % 4, [Completion(answers().completion(i % 4).tolist())]) for i in range(12)]
    clean = {tuple(s.completions[0].ids): s for s in samples}

    def knows(batch: TokenBatch) -> torch.Tensor:
        """−1 where a token is not the one of the nearest clean answer."""
        out = []
        for i in range(batch.n_prompts):
            mine = batch.completion(i)
            others = [torch.tensor(ids) for ids in clean if len(ids) == len(mine)]
            out.append(-(min((mine != o for o in others), key=lambda differs: int(differs.sum()))).float())
        return torch.cat(out)

    right = self_check(knows, samples, tokenizer())
    assert right.auc == 1
    assert right.what().startswith("credit is lower where an answer is corrupted: AUC 1.00")
    wrong = self_check(lambda batch: -knows(batch), samples, tokenizer())
    assert wrong.auc == 0
    assert "it points the wrong way: AUC 0.00" in wrong.what()
    none = self_check(lambda batch: torch.zeros(len(batch.labels)), samples, tokenizer())
    assert "cannot be told from chance: AUC 0.50" in none.what()


def test_what_credit_adds_to_surprise() -> None:
    """Nothing if it repeats surprise or knows nothing, all that is missing if it knows; NaN without places."""
    generator = torch.Generator().manual_seed(0)
    segments = Segments.from_lengths([12] * 40)
    marked = (segments.positions == 5) | (segments.positions == 9)
    surprise = torch.randn(segments.total, generator=generator) - marked.float()
    truth = -marked.float() + 0.1 * torch.randn(segments.total, generator=generator)
    noise = torch.randn(segments.total, generator=generator)
    alone = torch.stack(
        [torch.tensor(auc(-s, m)) for s, m in zip(*map(segments.split, (surprise, marked)), strict=True)]
    )
    gains = {
        name: added_auc(c, surprise, marked, segments)
        for name, c in (("same", 3 * surprise - 1), ("truth", truth), ("upside down", -truth), ("noise", noise))
    }
    assert gains["same"].abs().max() < 1e-9
    torch.testing.assert_close(gains["truth"], 1 - alone.double())
    torch.testing.assert_close(gains["upside down"], gains["truth"])
    assert abs(float(gains["noise"].mean())) < 0.03
    none = added_auc(noise, surprise, marked & (segments.ids < 3), segments)
    assert none[3:].isnan().all()


def test_what_cannot_be_corrupted(tmp_path: Path) -> None:
    one = TokenBatch.from_samples([Sample([1], [Completion([2])])])
    with pytest.raises(DataError, match="long enough"):
        corrupt(one, tokenizer())
    both = TokenBatch.from_samples([Sample([1], [Completion([5, 6]), Completion([6, 7])])])
    with pytest.raises(DataError, match="one answer per prompt"):
        corrupt(both, tokenizer())
    with pytest.raises(RecipeError, match="unlikely"):
        corrupt(answers(), tokenizer(), how="unlikely")
    with pytest.raises(RecipeError, match="expected one of"):
        corrupt(answers(), tokenizer(), how="burn")
    with pytest.raises(RecipeError, match="needs a model"):
        bench_corruption(None, "pairs.jsonl", output=tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny llama, a guide for it, and pairs."""
    for name, seed in (("model", 1), ("guide", 2)):
        llama(seed).float().save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    rows = [{"prompt": p, "chosen": " " + a, "rejected": " the sea ."} for p, a in TEXTS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return tmp_path


def test_command_line_on_a_model_and_rows(folder: Path) -> None:
    guide = f"{{name: guide, model: {folder / 'guide'}, beta: 0.3}}"
    own = f"{Path(__file__).parent / 'rigged.py'}:long_words"
    arguments = ["credit", "--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl")]
    arguments += ["--source", guide, "--source", "entropy", "--credit", own, "--how", "random", "--how", "swap"]
    found = CliRunner().invoke(bench_app, [*arguments, "--output", str(folder / "out")], env={"COLUMNS": "120"})
    assert found.exit_code == 0, found.output
    result = read_json(folder / "out" / "credit.json")
    assert [part["how"] for part in result["corruptions"]] == ["random", "swap"]
    entries = result["corruptions"][0]["sources"]
    assert [e["source"] for e in entries] == ["random", "surprise", "guide", "entropy", "long_words"]
    assert [e["passes"] for e in entries] == [0, 1, 2, 1, 0]
    assert all(0 <= e["measures"]["auc"]["mean"] <= 1 for e in entries)
    page = (folder / "out" / "credit.html").read_text()
    for text in ("corrupted tokens", 'class="role">clean<', "swap", 'data-name="guide"'):
        assert text in page
    assert "guide" in found.output


def test_a_run_folders_log_ratio_is_a_source(folder: Path) -> None:
    """A run without a credit stage: its model against where it started, at the objective's β."""
    run = folder / "run"
    (run / "train").mkdir(parents=True)
    (folder / "guide").rename(run / "train" / "model")
    (run / "recipe.yaml").write_text(
        f"method: dpo\nmodel: {folder / 'model'}\ndata: {folder / 'pairs.jsonl'}\noutput_dir: {run}\n"
        "stages: {train: {kind: train, objective: {name: dpo, beta: 0.3}}}\n"
    )
    stage = {"name": "train", "kind": "train", "status": "done", "fingerprint": ""}
    write_json(run / "run.json", {"status": "done", "method": "dpo", "stages": [stage]})
    write_json(run / "train" / "stage.json", {**stage, "seconds": 1.0, "settings": {}})
    quiet = Console(quiet=True)
    found = bench_corruption(None, str(folder / "pairs.jsonl"), sources=[str(run)], output=run / "out", console=quiet)
    assert found["model"] == str(folder / "model")
    spec = f"{{name: guide, model: {run / 'train' / 'model'}, beta: 0.3}}"
    model = str(folder / "model")
    same = bench_corruption(model, found["data"], sources=[spec], output=run / "out2", console=quiet)
    first, second = (r["corruptions"][0]["sources"][-1] for r in (found, same))
    assert first["source"] == "run: log-ratio"
    assert first["measures"] == second["measures"]
    assert first["deviation"] == pytest.approx(second["deviation"])


def test_sources_of_one_name_are_all_there(folder: Path) -> None:
    mine, quiet = str(Path(__file__).parent / "rigged.py") + ":long_words", Console(quiet=True)
    where = (str(folder / "model"), str(folder / "pairs.jsonl"))
    found = bench_corruption(*where, sources=["entropy"], credit=[mine, mine], output=folder / "out", console=quiet)
    names = [entry["source"] for entry in found["corruptions"][0]["sources"]]
    assert names == ["random", "surprise", "entropy", "long_words", "long_words (4)"]


def test_wrong_sources_are_named(folder: Path) -> None:
    model, data, quiet = str(folder / "model"), str(folder / "pairs.jsonl"), Console(quiet=True)
    with pytest.raises(RecipeError, match="did you mean 'entropy'"):
        bench_corruption(model, data, sources=["entropi"], console=quiet, output=folder)
    with pytest.raises(RecipeError, match="needs its model"):
        bench_corruption(model, data, sources=["guide"], console=quiet, output=folder)
    with pytest.raises(RecipeError, match="unknown setting"):
        bench_corruption(model, data, sources=["{name: random, lo: 1}"], console=quiet, output=folder)
    found = CliRunner().invoke(bench_app, ["credit", "--model", model])
    assert isinstance(found.exception, RecipeError)
