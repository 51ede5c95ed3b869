"""The framework of claims: when a claim is seen, resuming, tables, the command."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from experiments.claims import runner
from experiments.claims.framework import Arm, Claim, Finding, Group, judge
from experiments.claims.groups import GROUPS
from experiments.claims.report import claims_command, findings_table, page, runs_markdown
from experiments.claims.runner import find_groups, judge_all, run_claims
from rich.console import Console

from tokengrain.errors import RecipeError


@dataclass(frozen=True)
class Size:
    size: int


class Calls(list):
    """Which (seed, arm) were run."""


CALLS = Calls()


def _prepare(seed: int, scale: Size) -> tuple[int, int]:
    return seed, scale.size


def _run(context: tuple[int, int], arm: Arm) -> dict[str, float | None]:
    seed, size = context
    CALLS.append((seed, arm.name))
    return {"score": arm.settings["gain"] * size + 0.1 * seed, "other": None}


def claim(expect: Any = "above", **more: Any) -> Claim:
    return Claim(
        "better", "new is above old", **{"first": "new", "second": "old", "measure": "score"} | more, expect=expect
    )


GROUP = Group(
    name="small",
    title="A small group",
    setting="Numbers.",
    scales=(Size(10), Size(1)),
    arms=(Arm("old", "base", {"gain": 1.0}), Arm("new", "better", {"gain": 2.0}), Arm("other", "third", {"gain": 0.0})),
    claims=(claim(), replace(claim("below"), method="third", first="other", says="other is below old")),
    prepare=_prepare,
    run=_run,
    columns={"score": "the score", "other": "something else"},
)


@pytest.fixture(autouse=True)
def _forget_calls() -> None:
    CALLS.clear()


def results(first: list[float | None], second: list[float | None]) -> list[dict[str, Any]]:
    """Runs of the arms "new" and "old", one per seed."""
    rows = []
    for arm, values in (("new", first), ("old", second)):
        rows += [
            {"group": "g", "arm": arm, "seed": seed, "measures": {"score": value}} for seed, value in enumerate(values)
        ]
    return rows


def verdict(c: Claim, first: list[float | None], second: list[float | None]) -> str:
    found = judge("g", c, results(first, second))
    assert found is not None
    return found.verdict


def test_interval_must_lie_beyond_the_threshold() -> None:
    # Differences 1.0, 1.2, 0.8: mean 1, standard error 0.1155, t(2) = 4.303: 0.503 to 1.497.
    first, second = [2.0, 2.2, 1.8], [1.0, 1.0, 1.0]
    found = judge("g", claim(), results(first, second))
    assert found is not None
    assert found.value is not None
    assert found.value.value == pytest.approx(1.0)
    assert found.value.low == pytest.approx(0.5032, abs=1e-4)
    assert found.value.high == pytest.approx(1.4968, abs=1e-4)
    assert (found.higher, found.seeds, found.verdict) == (3, 3, "seen")
    assert verdict(claim(threshold=0.5), first, second) == "seen"
    assert verdict(claim(threshold=0.51), first, second) == "not seen"
    assert verdict(claim("below"), first, second) == "not seen"
    assert verdict(claim("below", threshold=1.5), first, second) == "seen"


def test_mean_and_every_seed_are_weaker_and_stronger_than_it_looks() -> None:
    first, second = [2.0, 2.0, 0.9], [1.0, 1.0, 1.0]
    assert verdict(claim(), first, second) == "not seen"
    assert verdict(claim(judged="mean"), first, second) == "seen"
    assert verdict(claim(judged="every seed"), first, second) == "not seen"
    assert verdict(claim(judged="every seed"), [2.0, 9.0, 1.1], second) == "seen"


def test_same_means_that_the_interval_contains_no_effect() -> None:
    assert verdict(claim("same"), [1.1, 0.9, 1.0], [1.0, 1.0, 1.0]) == "seen"
    assert verdict(claim("same"), [1.1, 1.1001, 1.1002], [1.0, 1.0, 1.0]) == "not seen"


def test_ratio_and_within() -> None:
    half = claim("below", form="ratio", threshold=0.5, judged="every seed")
    assert verdict(half, [1.0, 2.0], [3.0, 5.0]) == "seen"
    assert verdict(half, [1.0, 2.0], [3.0, 4.0]) == "not seen"  # 0.5 is not below 0.5
    close = claim("within", form="ratio", threshold=0.05, judged="every seed")
    assert verdict(close, [1.04, 0.96], [1.0, 1.0]) == "seen"
    assert verdict(close, [1.06, 0.96], [1.0, 1.0]) == "not seen"
    assert verdict(claim("within", threshold=0.05), [1.001, 0.999], [1.0, 1.0]) == "seen"
    ratio = judge("g", half, results([1.0, 2.0, 3.0], [2.0, 0.0, 3.0]))
    assert ratio is not None
    assert ratio.seeds == 2  # the seed whose divisor is 0 is left out


def test_one_arm_is_held_against_the_threshold() -> None:
    alone = claim(second=None, threshold=0.8, judged="every seed")
    found = judge("g", alone, results([0.9, 0.7], []))
    assert found is not None
    assert (found.second, found.higher, found.verdict) == (None, 1, "not seen")
    assert verdict(alone, [0.9, 0.81], []) == "seen"


def test_only_seeds_that_both_arms_have_count() -> None:
    found = judge("g", claim(), results([2.0, None, 4.0, float("nan")], [1.0, 1.0, 1.0]))
    assert found is not None
    assert (found.seeds, found.first) == (2, 3.0)
    assert judge("g", claim(), results([], [1.0])) is None
    assert verdict(claim(), [2.0], [1.0]) == "too few seeds"


def test_claims_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a second arm"):
        claim(second=None, form="ratio")
    with pytest.raises(ValueError, match="judged by the interval"):
        claim("same", judged="mean")
    with pytest.raises(ValueError, match="names no arm"):
        replace(GROUP, claims=(claim(first="newer"),))
    with pytest.raises(ValueError, match="no column"):
        replace(GROUP, claims=(claim(measure="length"),))


def run(folder: Path, seeds: int = 2, **more: Any) -> list[dict[str, Any]]:
    return run_claims([GROUP], range(seeds), folder, console=Console(quiet=True), **more)


def test_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert [(seed, arm) for seed in (0, 1) for arm in ("old", "new", "other")] == CALLS
    CALLS.clear()
    again = run(tmp_path, seeds=3)
    assert CALLS == [(2, "old"), (2, "new"), (2, "other")]
    assert [r for r in again if r["seed"] < 2] == first
    assert len(again) == 9


def test_a_run_that_was_cut_off_is_repeated(tmp_path: Path) -> None:
    run(tmp_path, seeds=1)
    log = tmp_path / runner.LOG
    log.write_bytes(log.read_bytes()[:-20])
    CALLS.clear()
    assert len(run(tmp_path, seeds=1)) == 3
    assert CALLS == [(0, "other")]
    assert [json.loads(line)["arm"] for line in log.read_text().splitlines()] == ["old", "new", "other"]


def test_a_run_that_two_calls_did_counts_once(tmp_path: Path) -> None:
    first = run(tmp_path)
    log = tmp_path / runner.LOG
    log.write_bytes(2 * log.read_bytes())
    assert run(tmp_path) == first


def test_a_failing_arm_leaves_what_was_finished(tmp_path: Path) -> None:
    def fail(context: tuple[int, int], arm: Arm) -> dict[str, float | None]:
        if arm.name == "new":
            raise RuntimeError("boom")
        return _run(context, arm)

    with pytest.raises(RuntimeError, match="boom"):
        run_claims([replace(GROUP, run=fail)], [0], tmp_path, console=Console(quiet=True))
    CALLS.clear()
    run(tmp_path, seeds=1)
    assert CALLS == [(0, "new"), (0, "other")]


def test_quick_runs_and_other_settings_do_not_mix(tmp_path: Path) -> None:
    full, quick = run(tmp_path), run(tmp_path, quick=True)
    assert {r["measures"]["score"] for r in full}.isdisjoint(
        r["measures"]["score"] for r in quick if r["arm"] != "other"
    )
    assert len(CALLS) == 12
    changed = replace(GROUP, arms=(*GROUP.arms[:2], Arm("other", "third", {"gain": 5.0})))
    assert len(run_claims([changed], range(2), tmp_path, console=Console(quiet=True))) == 6
    assert CALLS[12:] == [(0, "other"), (1, "other")]


def test_a_method_brings_its_arms_and_what_they_are_compared_with(tmp_path: Path) -> None:
    found = run(tmp_path, methods=["better"])
    assert {r["arm"] for r in found} == {"old", "new"}
    assert [f.claim.method for f in judge_all([GROUP], found, ["better"])] == ["better"]
    assert GROUP.chosen(["unknown"]) == ([], [])


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    group = GROUPS["aligndistil"]
    options: dict[str, Any] = {"quick": True, "console": Console(quiet=True)}
    alone = run_claims([group], range(2), tmp_path / "alone", jobs=1, **options)
    together = run_claims([group], range(2), tmp_path / "together", jobs=2, **options)

    def plain(rows: list[dict[str, Any]]) -> list[Any]:
        return sorted((r["seed"], r["arm"], r["measures"]["reward"]) for r in rows if "reward" in r["measures"])

    assert plain(alone) == plain(together)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RecipeError, match="unknown method 'rrppo'"):
        find_groups(methods=["rrppo"])
    with pytest.raises(RecipeError, match="unknown group 'storys'"):
        find_groups(groups=["storys"])
    with pytest.raises(RecipeError, match="no claim of these groups is about rrpo; theirs: sepo"):
        find_groups(groups=["sepo"], methods=["rrpo"])
    assert [g.name for g in find_groups(methods=["sepo"])] == ["sepo", "stories-noisy", "stories-clean"]
    assert [g.name for g in find_groups(groups=["qrm"])] == ["qrm"]


def findings(seeds: int = 3) -> tuple[list[dict[str, Any]], list[Finding]]:
    rows = [
        {"group": "small", "arm": arm.name, "seed": seed, "seconds": 1.0, "measures": _run((seed, 10), arm)}
        for seed in range(seeds)
        for arm in GROUP.arms
    ]
    return rows, judge_all([GROUP], rows)


def test_page_has_claims_runs_and_command() -> None:
    rows, found = findings()
    how = {"command": "tokengrain bench claims", "date": "2026-01-01", "machine": "m", "seeds": 3, "quick": False}
    text = page([GROUP], rows, found, how)
    assert "`tokengrain bench claims` on 2026-01-01" in text
    assert "2 of 2 claims were seen over 3 seeds." in text
    assert "| new is above old |  | score: new: 20.1; old: 10.1 | +10.0 (+10.0 to +10.0) | 3/3 |" in text
    assert "| difference above 0 (interval) | no | seen |" in text
    assert "Quick sizes" not in text
    assert "Quick sizes" in page([GROUP], rows, found, how | {"quick": True})


def test_table_of_runs_shows_means_spread_and_seeds() -> None:
    rows, _ = findings()
    lines = runs_markdown(GROUP, rows)
    assert lines[0] == "| run | the score | something else | seconds |"
    assert lines[3] == "| new | 20.1 ± 0.10 (20.0 20.1 20.2) | – | 1 |"


def test_terminal_table_has_a_section_per_group() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(findings_table(findings()[1]))
    text = console.export_text()
    for part in ("small", "new is above old", "+10.0", "3/3", "seen"):
        assert part in text


def test_command_writes_page_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims_command(["aligndistil"], ["aligndistil"], 2, 1, tmp_path, quick=True, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "claims.json").read_text())
    assert printed == written
    assert written["quick"] is True
    assert {c["method"] for c in written["claims"]} == {"aligndistil"}
    assert {"value", "low", "high", "verdict", "expected", "higher_in"} <= written["claims"][0].keys()
    assert "## AlignDistil" in (tmp_path / "claims.md").read_text()


def test_every_group_is_consistent() -> None:
    for name, group in GROUPS.items():
        assert group.name == name
        assert len({arm.name for arm in group.arms}) == len(group.arms)
        assert len({claim.says for claim in group.claims}) == len(group.claims)
        keys = [group.key(arm, quick) for arm in group.arms for quick in (False, True)]
        assert len(set(keys)) == 2 * len(group.arms)
