"""The vectors of the methods that are built, and the runner itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.vectors.__main__ import main
from tests.vectors.runner import (
    ADAPTERS,
    Case,
    adapter_for,
    compare,
    flattened,
    run_case,
    run_paths,
    with_gradients,
)

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"
METHODS = ("aligndistil", "ddro", "dpo", "qrm", "rrpo", "sepo", "simpo", "tdpo", "tgdpo", "treg")
# Their losses come in several normalisations: dicts, not numbers.
ONLINE = ("ares", "dapo", "dcpo", "dro", "grpo", "gspo", "rto", "thr", "timemaster")
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


# What other files of vectors may bring.


def _filled(case: dict, garbage: float) -> dict:
    """The case with masked positions of its inputs replaced."""
    inputs = dict(case["inputs"])
    mask = torch.tensor(inputs["mask"]).bool()
    for name, value in inputs.items():
        values = torch.tensor(value, dtype=torch.float64) if name != "mask" and _is_padded(value, mask) else None
        if values is not None and not name.endswith(("ids", "actions", "_mask")):
            keep = mask.view(*mask.shape, *[1] * (values.dim() - 2)).expand_as(values)
            inputs[name] = torch.where(keep, values, garbage).tolist()
    return {**case, "inputs": inputs}


def _is_padded(value: object, mask: torch.Tensor) -> bool:
    return isinstance(value, list) and isinstance(value[0], list) and torch.tensor(value).shape[:2] == mask.shape


def _ragged(case: dict) -> dict | None:
    """The case with rows of unequal lengths in place of its mask; None if masked tokens do not only stand behind."""
    mask = torch.tensor(case["inputs"]["mask"]).bool()
    lengths = mask.sum(1).tolist()
    if not torch.equal(mask, torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)):
        return None
    cut = lambda v: [row[:n] for row, n in zip(v, lengths, strict=True)]  # noqa: E731
    inputs = {k: cut(v) if _is_padded(v, mask) else v for k, v in case["inputs"].items() if k != "mask"}
    return {**case, "inputs": inputs}


def _masked_cases(method: str) -> list[dict]:
    return [case for case in _file(method)["cases"] if "mask" in case["inputs"]]


# Expected at masked positions are there what the authors' code gives for the numbers that stand there.
UNMASKED = {"ratio_low", "ratio_high", "token_kl"}


def _without(case: dict, names: set[str]) -> dict:
    return {**case, "expected": {k: v for k, v in case["expected"].items() if k not in names}}


@pytest.mark.parametrize("method", ["ares", "dapo", "dcpo", "dro", "grpo", "gspo", "qrm", "rto", "thr"])
@pytest.mark.parametrize("garbage", [float("nan"), float("-inf"), 1e30])
def test_masked_positions_of_rollouts_do_not_matter(method: str, garbage: float) -> None:
    cases = _masked_cases(method)
    assert cases
    for case in cases:
        result = run_case(method, _without(_filled(case, garbage), UNMASKED))
        assert not result.failed, result
        assert not result.skipped


@pytest.mark.parametrize("method", ["ares", "dapo", "dcpo", "dro", "grpo", "gspo", "rto", "thr"])
def test_rows_of_unequal_lengths_need_no_mask(method: str) -> None:
    found = 0
    for case in _masked_cases(method):
        ragged = _ragged(case)
        if ragged is not None:
            expected = {k: v for k, v in case["expected"].items() if _same_for_ragged(k, v, case)}
            result = run_case(method, {**ragged, "expected": expected})
            assert not result.failed, result
            found += bool(expected)
    assert found


def _same_for_ragged(key: str, value: object, case: dict) -> bool:
    """Arrays over tokens have another shape then: losses, values per row and gradients are compared."""
    return key not in UNMASKED and not _is_padded_anywhere(value, torch.tensor(case["inputs"]["mask"]).bool())


def _is_padded_anywhere(value: object, mask: torch.Tensor) -> bool:
    if isinstance(value, dict):
        return any(_is_padded_anywhere(v, mask) for v in value.values())
    return isinstance(value, list) and bool(value) and isinstance(value[0], list) and _is_padded(value, mask)


def test_gradients_of_ragged_rows_are_ragged() -> None:
    case = next(c for c in _masked_cases("grpo") if c["function"] == "loss" and _ragged(c) is not None)
    mask, grads = case["inputs"]["mask"], case["expected"]["grad_logps"]
    cut = {k: [row[: int(sum(m))] for row, m in zip(v, mask, strict=True)] for k, v in grads.items()}
    ragged = {**_ragged(case), "expected": {"loss": case["expected"]["loss"], "grad_logps": cut}}
    assert not run_case("grpo", ragged).failed
    cut[next(iter(cut))][0][0] += 1e-4
    assert list(run_case("grpo", ragged).differences) == [f"grad_logps.{next(iter(cut))}"]


OLD = {"old_logps": ("logps", "new_logps"), "old_log_probs": ("log_probs",), "old_logprobs": ("logprobs",)}


@pytest.mark.parametrize("method", ["ares", "dapo", "dcpo", "dro", "grpo", "gspo", "rto", "thr"])
def test_on_policy_cases_need_no_old_log_probabilities(method: str) -> None:
    """Where they are absent they are the policy's own: the same as a case that brings those."""
    found = 0
    for case in _masked_cases(method):
        name = next((n for n in OLD if n in case["inputs"]), None)
        own = next((n for n in OLD.get(name, ()) if n in case["inputs"]), None)
        if name is None or own is None:
            continue
        inputs = {**case["inputs"], name: case["inputs"][own]}
        absent = {k: v for k, v in inputs.items() if k != name}
        run = adapter_for(method, case.get("function"))
        one, other = (
            flattened(with_gradients(c, run(c)))
            for c in (Case.read({**case, "inputs": given}) for given in (inputs, absent))
        )
        for key, value in one.items():
            wanted = value.detach().tolist() if isinstance(value, torch.Tensor) else value
            if key.rpartition(".")[2] not in UNMASKED:
                assert compare(other[key], wanted) is None, (method, case["name"], key)
        found += 1
    assert found


def test_q_values_that_are_rewards_go_through_gae() -> None:
    case = next(c for c in _file("qrm")["cases"] if c["function"] == "rl_advantages")
    mask = torch.tensor(case["inputs"]["mask"]).bool()
    rewards, values = (
        torch.tensor(x, dtype=torch.float64) for x in (case["expected"]["rewards"], case["inputs"]["values"])
    )
    advantages = torch.zeros_like(rewards)
    for b in range(len(mask)):
        running, following = 0.0, 0.0
        for t in reversed(mask[b].nonzero().flatten().tolist()):
            running = rewards[b, t] + 0.9 * following - values[b, t] + 0.9 * 0.8 * running
            following, advantages[b, t] = values[b, t], running
    returns = torch.where(mask, advantages + values, 0.0)
    expected = {"rewards": rewards.tolist(), "advantages": advantages.tolist(), "returns": returns.tolist()}
    params = {**case["params"], "reward_is_q": False, "gamma": 0.9, "lam": 0.8}
    result = run_case("qrm", {**case, "params": params, "expected": expected})
    assert not result.failed, result
    assert not result.skipped_keys


def test_thresholds_may_be_given() -> None:
    case = next(c for c in _file("ares")["cases"] if c["function"] == "hwe_stats_code")
    counted = ("n_he", "n_trigger_below", "soft_cost")
    expected = {k: v for k, v in case["expected"].items() if k in counted or k == "batch_threshold_median"}
    given = {k: v for k, v in case["params"].items() if not k.startswith("ema")}
    result = run_case("ares", {**case, "params": given, "expected": expected})
    assert not result.failed, result
    assert not result.skipped_keys
    case = next(c for c in _file("thr")["cases"] if c["function"] == "thr" and c["params"]["tau_beta"] is not None)
    given = {k: v for k, v in case["params"].items() if k != "tau_beta"} | {"tau": case["expected"]["tau"]}
    result = run_case("thr", {**case, "params": given})
    assert not result.failed, result


@pytest.mark.parametrize("function", ["aligndistil_loss", "constant_contrast_loss", "rlhf_distill_loss"])
def test_a_students_head_may_be_wider_than_its_teachers(function: str) -> None:
    for case in (c for c in _file("aligndistil")["cases"] if c["function"] == function):
        wide = [[[*row, 3.0, -1.0] for row in rows] for rows in case["inputs"]["student_logits"]]
        grads = [[[*row, 0.0, 0.0] for row in rows] for rows in case["expected"]["grad_student_logits"]]
        inputs = {**case["inputs"], "student_logits": wide}
        expected = {**case["expected"], "grad_student_logits": grads}
        result = run_case("aligndistil", {**case, "inputs": inputs, "expected": expected})
        assert not result.failed, result
