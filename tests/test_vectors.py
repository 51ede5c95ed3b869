"""The vectors of the methods that are built, and the runner itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.vectors.__main__ import main
from tests.vectors.runner import ADAPTERS, compare, run_case, run_paths

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"
METHODS = ("aligndistil", "dpo", "qrm", "rrpo", "sepo", "simpo", "tdpo", "tgdpo", "treg")
# Their losses come in several normalisations: dicts, not numbers.
ONLINE = ("ares", "dapo", "dcpo", "dro", "grpo", "gspo", "rto", "thr")
# Where the authors' code counts other positions than the paper there is nothing of the kind in the library; and the
# whole vocabulary's entropy cannot be had from the inputs given, the largest log-probabilities.
NOT_OURS = {"off_policy_code", "on_policy_code", "token_entropy_full_vocab"}


def _file(method: str) -> dict:
    path = VECTORS / f"{method}.json"
    if not path.is_file():
        pytest.skip(f"no test vectors at {path}")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", [*METHODS, *ONLINE])
def test_every_case_and_key_passes(method: str) -> None:
    data = _file(method)
    for case in data["cases"]:
        result = run_case(method, case)
        assert not result.failed, result
        assert not result.skipped, result
        assert set(result.skipped_keys) <= NOT_OURS, result


@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_expected_value_is_found(method: str, tmp_path: Path) -> None:
    data = _file(method)
    case = next(c for c in data["cases"] if "loss" in c["expected"])
    case["expected"]["loss"] += 1e-4
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**data, "cases": [case]}))
    lines: list[str] = []
    assert run_paths([path], lines.append) == 1
    assert lines[-1] == "0 passed, 1 failed, 0 skipped"
    assert "loss: largest error 0.0001" in lines[0]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("grpo", "loss.token_mean"),
        ("grpo", "grad_logps.constant"),
        ("gspo", "gspo.grad_logps"),
        ("dcpo", "steps.1.state_after.a.std"),
    ],
)
def test_a_wrong_value_inside_a_dict_is_found(method: str, path: str) -> None:
    *parents, last = path.split(".")
    for case in _file(method)["cases"]:
        try:
            part = case["expected"]
            for key in parents:
                part = part[int(key) if isinstance(part, list) else key]
            part[last] = (torch.tensor(part[last], dtype=torch.float64) + 1e-4).tolist()
        except (KeyError, TypeError):
            continue
        assert list(run_case(method, case).differences) == [path]
        return
    pytest.fail(f"no case of {method} has {path}")


def test_a_gradient_equal_to_the_negative_control_fails() -> None:
    case = next(c for c in _file("treg")["cases"] if c["name"] == "dpo_reg_ragged")
    control = next(k for k in case["expected"] if k.startswith("wrong_grad"))
    case["expected"][control] = case["expected"]["grad_policy_chosen_per_token_logps"]
    assert list(run_case("treg", case).differences) == [control]


@pytest.mark.parametrize("method", ["dpo", "simpo", "tdpo", "tgdpo", "treg"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_masked_inputs_do_not_matter(method: str, garbage: float) -> None:
    for case in _file(method)["cases"]:
        inputs = case["inputs"]
        for name, value in inputs.items():
            if name.endswith("per_token_logps") and ("chosen_mask" in inputs or "mask" in inputs):
                side = "chosen_mask" if "chosen" in name else "rejected_mask"
                mask = torch.tensor(inputs.get(side, inputs.get("mask"))).bool()
                inputs[name] = torch.where(mask, torch.tensor(value, dtype=torch.float64), garbage).tolist()
            if name.endswith("logits"):
                side = next(s for s in ("chosen", "rejected", "better", "worse") if s in name)
                logits = torch.tensor(value, dtype=torch.float64)
                counted = torch.zeros(logits.shape[:2], dtype=torch.bool)
                counted[:, :-1] = torch.tensor(inputs[f"{side}_labels"])[:, 1:] != -100
                inputs[name] = torch.where(counted[..., None], logits, garbage).tolist()
        result = run_case(method, case)
        assert not result.failed, result


@pytest.mark.parametrize("method", ["aligndistil", "qrm", "rrpo", "sepo"])
@pytest.mark.parametrize("garbage", [float("nan"), float("-inf"), 1e30])
def test_masked_inputs_of_other_layouts_do_not_matter(method: str, garbage: float) -> None:
    changed = 0
    for case in _file(method)["cases"]:
        inputs = case["inputs"]
        for name, value in inputs.items():
            side = next(
                (f"{s}_mask" for s in ("chosen", "rejected", "response") if f"{s}_mask" in inputs and s in name), "mask"
            )
            side = "response_mask" if name == "sequence_scores" else side
            if side not in inputs or name.endswith(("mask", "ids", "labels", "actions", "spans")):
                continue
            keep, values = torch.tensor(inputs[side]).bool(), torch.tensor(value, dtype=torch.float64)
            if method == "rrpo":  # position t of the logits scores t + 1
                keep = torch.cat([keep[:, 1:], torch.zeros_like(keep[:, :1])], dim=1)
            keep = keep[..., None].expand_as(values) if values.dim() == 3 else keep
            inputs[name] = torch.where(keep, values, garbage).tolist()
            changed += 1
        result = run_case(method, case)
        assert not result.failed, result
    assert changed


@pytest.mark.parametrize(
    ("produced", "expected", "difference"),
    [
        ([[1.0], [2.0, 3.0]], [[1], [2, 3]], None),
        ([torch.tensor([1.0]), torch.tensor([2.0, 3.0])], [[1], [2, 3]], None),
        ([[1.0], [2.0, 4.0]], [[1], [2, 3]], "row 1: largest error 1"),
        ([[1.0]], [[1], [2, 3]], "1 rows, expected 2"),
        ([[1.0], [2.0]], [[1], [2, 3]], "row 1: shape"),
        (torch.tensor([0.0, -torch.inf]), [0.0, "-inf"], None),
        (torch.tensor([0.0, -9.0]), [0.0, "-inf"], "1 NaN or infinite"),
    ],
)
def test_comparison_of_odd_shapes(produced: object, expected: object, difference: str | None) -> None:
    found = compare(produced, expected)
    assert found is None if difference is None else difference in (found or "")


def test_unknown_functions_and_keys_are_reported(tmp_path: Path) -> None:
    data = _file("dpo")
    case = next(c for c in data["cases"] if c["function"] == "dpo_loss")
    case["expected"]["something_else"] = 1.0
    foreign = {**case, "function": "not_there"}
    (tmp_path / "one.json").write_text(json.dumps({**data, "cases": [case, foreign]}))
    (tmp_path / "two.json").write_text(json.dumps({"method": "unheard_of", "cases": [{**case, "function": None}]}))
    lines: list[str] = []
    assert run_paths([tmp_path], lines.append) == 0
    assert lines[-1] == "1 passed, 0 failed, 2 skipped"
    assert any("keys skipped" in line and "something_else" in line for line in lines)
    assert "no adapter: dpo not_there" in lines
    assert "no adapter: unheard_of (its only function)" in lines


def test_unknown_parameters_fail() -> None:
    case = next(c for c in _file("dpo")["cases"] if c["function"] == "dpo_loss")
    case["params"]["temperature"] = 2.0
    assert "temperature" in (run_case("dpo", case).error or "")


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    _file("dpo")
    assert main([str(VECTORS / "dpo.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("passed, 0 failed, 0 skipped")
    assert main([]) == 2
    assert main(["no-such-path"]) == 2
    assert len(ADAPTERS) >= 10
