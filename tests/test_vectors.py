"""The vectors of the methods that are built, and the runner itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.vectors.__main__ import main
from tests.vectors.runner import ADAPTERS, run_case, run_paths

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"
METHODS = ("dpo", "simpo", "tdpo", "tgdpo", "treg")


def _file(method: str) -> dict:
    path = VECTORS / f"{method}.json"
    if not path.is_file():
        pytest.skip(f"no test vectors at {path}")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", METHODS)
def test_every_case_and_key_passes(method: str) -> None:
    data = _file(method)
    for case in data["cases"]:
        result = run_case(method, case)
        assert not result.failed, result
        assert not result.skipped, result
        assert not result.skipped_keys, result


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
