"""DDRO's vectors in other forms give the same numbers: without masks, ragged, one row, padding as -100 or asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.test_vectors import _file
from tests.vectors.runner import run_case

Data = dict[str, Any]


def lengths(mask: list[list[float]]) -> list[int]:
    return [int(sum(row)) for row in mask]


def ragged(case: Data) -> None:
    """Rows end with their docids, and there is no mask."""
    for side in ("pos", "neg"):
        rows = lengths(case["inputs"].pop(f"{side}_mask"))
        for kind, name in (("inputs", f"policy_{side}_logits"), ("inputs", f"ref_{side}_logits")):
            case[kind][name] = [row[:n] for row, n in zip(case[kind][name], rows)]
        case["inputs"][f"{side}_labels"] = [row[:n] for row, n in zip(case["inputs"][f"{side}_labels"], rows)]
        for name in (f"{side}_token_logps", f"grad_{side}_token_logps", f"grad_policy_{side}_logits"):
            case["expected"][name] = [row[:n] for row, n in zip(case["expected"][name], rows)]


def ignored(case: Data) -> None:
    """Padding is -100, as a loss of torch ignores it."""
    for side in ("pos", "neg"):
        mask, labels = case["inputs"].pop(f"{side}_mask"), case["inputs"][f"{side}_labels"]
        case["inputs"][f"{side}_labels"] = [[i if m else -100 for i, m in zip(*row)] for row in zip(labels, mask)]


def padding_named(case: Data) -> None:
    del case["inputs"]["pos_mask"], case["inputs"]["neg_mask"]
    case["params"]["pad_id"] = 0


def first_row(case: Data) -> None:
    case["inputs"] = {name: rows[:1] for name, rows in case["inputs"].items()}
    case["expected"] = {k: v[:1] for k, v in case["expected"].items() if k != "loss" and not k.startswith("grad")}
    case["expected"]["loss"] = case["expected"]["per_example"][0]


def given_logps(case: Data) -> None:
    kept = case["expected"]
    masks = {name: value for name, value in case["inputs"].items() if name.endswith("mask")}
    sums = {f"ref_{side}_logps": kept[f"ref_{side}_logps"] for side in ("pos", "neg")}
    tokens = {f"policy_{side}_token_logps": kept[f"{side}_token_logps"] for side in ("pos", "neg")}
    # Of the reference the sums are known: all of a sum may stand at one token.
    for side in ("pos", "neg"):
        rows = masks[f"{side}_mask"]
        tokens[f"ref_{side}_token_logps"] = [
            [total, *[0.0] * (len(row) - 1)] for total, row in zip(sums[f"ref_{side}_logps"], rows)
        ]
    case["inputs"] = tokens | masks
    case["expected"] = {k: v for k, v in kept.items() if not k.startswith("grad_policy")}
    case["expected"] |= {f"grad_policy_{side}_token_logps": kept[f"grad_{side}_token_logps"] for side in ("pos", "neg")}


@pytest.mark.parametrize("change", [ragged, ignored, padding_named, first_row, given_logps])
def test_pairs_of_docids(change: Callable[[Data], None]) -> None:
    cases = [c for c in copy.deepcopy(_file("ddro")["cases"]) if c["function"] == "ddro_loss"]
    for case in cases:
        change(case)
        result = run_case("ddro", case)
        assert not result.failed, result
        assert not result.skipped_keys, result


def sft(**params: Any) -> Data:
    (case,) = (c for c in copy.deepcopy(_file("ddro")["cases"]) if c["function"] == "docid_sft_loss")
    case["params"] |= params
    found: Data = case
    return found


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("form", ["mask", "none", "ignored"])
def test_padding_counts_if_it_is_asked_for(counts: bool, form: str) -> None:
    case, kind = sft(pad_counts=counts), "pad_counts" if counts else "pad_ignored"
    mask = case["inputs"]["mask"] if form == "mask" else case["inputs"].pop("mask")
    if form == "ignored":
        labels = case["inputs"]["labels"]
        case["inputs"]["labels"] = [[i if m else -100 for i, m in zip(*row)] for row in zip(labels, mask)]
    case["expected"] |= {
        "loss": case["expected"][f"loss_{kind}"],
        "grad_logits": case["expected"][f"grad_logits_{kind}"],
    }
    result = run_case("ddro", case)
    assert not result.failed, result
    assert not result.skipped_keys, result


def test_padding_beyond_the_longest_docid_counts_too() -> None:
    """Rows are as long as the longest docid that there may be. Another padding id, and a mask with holes."""
    logits = [[[0.0, 1.0, 2.0]] * 4, [[1.0, 0.0, 0.0]] * 4]
    logp = [torch.tensor(row).log_softmax(-1) for row in logits]
    labels, mask = [[0, 1, 2, 2], [1, 2, 2, 2]], [[1, 1, 0, 0], [0, 1, 0, 0]]
    every = [-logp[b][t][labels[b][t]].item() for b in range(2) for t in range(4)]
    kept = [every[0], every[1], every[5]]
    case = {
        "name": "wide",
        "params": {"pad_id": 2, "eos_id": 1, "decoder_start_id": 2},
        "inputs": {"logits": logits, "labels": labels, "mask": mask},
        "expected": {"loss_pad_counts": sum(every) / 8, "loss_pad_ignored": sum(kept) / 3, "loss": sum(kept) / 3},
    }
    result = run_case("ddro", {**case, "function": "docid_sft_loss"})
    assert not result.failed, result


def test_ragged_docids_have_no_padding_to_count() -> None:
    case = sft()
    rows, kept = lengths(case["inputs"].pop("mask")), ("loss_pad_ignored", "grad_logits_pad_ignored")
    for name in ("logits", "labels"):
        case["inputs"][name] = [row[:n] for row, n in zip(case["inputs"][name], rows)]
    case["expected"] = {name: case["expected"][name] for name in kept}
    case["expected"]["grad_logits_pad_ignored"] = [
        row[:n] for row, n in zip(case["expected"]["grad_logits_pad_ignored"], rows)
    ]
    assert not run_case("ddro", case).failed


def test_documents_that_are_numbers_and_share_docids() -> None:
    case = {
        "name": "numbers",
        "params": {"metrics": ["MRR@10", "R@1"]},
        "inputs": {"predictions": [[4, 7, 7], [[3, 5], 9]], "truth": [[7], [5]]},
        "expected": {"per_query": [{"MRR@10": 0.5, "R@1": 0.0}, {"MRR@10": 0.75, "R@1": 0.5}]},
    }
    result = run_case("ddro", {**case, "function": "ranking_metrics"})
    assert not result.failed, result


@pytest.mark.parametrize(
    ("docids", "table"),
    [(["a", "b"], {"a": ["d4"], "b": ["d3", "d5"]}), ([[7, 1], [7, 2]], {"7,1": ["d4"], "7,2": ["d3", "d5"]})],
)
def test_a_table_of_documents_that_share_docids(docids: Any, table: Any) -> None:
    case = {
        "name": "table",
        "params": {"metrics": ["MRR@10", "Hit@2"]},
        "inputs": {"predictions": [docids], "truth": [["d5"]], "docid_to_documents": table},
        "expected": {"per_query": [{"MRR@10": (1 / 2 + 1 / 3) / 2, "Hit@2": 0.5}]},
    }
    result = run_case("ddro", {**case, "function": "ranking_metrics"})
    assert not result.failed, result


def test_search_with_shared_probabilities() -> None:
    """Those of what the trie allows are divided by their sum, at every step."""
    table = {"0": [-9, -9, -1.0, -2.0], "0,2": [-9, -1.5, -1.5, -9], "0,3": [-9, -0.5, -9, -9]}
    first = [-0.31326168751822286, -1.3132616875182228]  # of 2 and 3
    scores = sorted([first[0] + -0.6931471805599453, first[0] + -0.6931471805599453, first[1]], reverse=True)
    case = {
        "name": "renormalised",
        "params": {"num_beams": 3, "start_id": 0, "pad_id": 0, "eos_id": 1, "renormalise": True},
        "inputs": {"docids": [[2, 1], [2, 2], [3, 1], [3, 1]], "logprob_table": table},
        "expected": {"scores": scores, "scores_renormalised": scores, "exhaustive_scores": scores},
    }
    result = run_case("ddro", {**case, "function": "constrained_beam_search"})
    assert not result.failed, result
