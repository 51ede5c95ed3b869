"""What a claim is, and when it counts as seen.

A group is one experiment: data and models that a seed determines, and arms (training settings) that start from them.
A claim compares one measure of two arms of a group, paired by seed, or holds one arm's measure against a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Generic, Literal, TypeVar

from tokengrain.errors import fingerprint
from tokengrain.evaluation.statistics import Estimate, mean_of_runs

Expect = Literal["above", "below", "same", "within"]
Judged = Literal["interval", "every seed", "mean"]
Verdict = Literal["seen", "not seen", "too few seeds"]
Measures = dict[str, float | None]
Sizes = TypeVar("Sizes")


@dataclass(frozen=True)
class Claim:
    """One statement of a paper or of a method's specification that an experiment can bear out.

    Attributes:
        method: whose claim it is (`--method` chooses by it).
        says: the claim in words.
        first, second: names of arms; `second` None: `first` alone is held against the threshold.
        measure: key in the measures of a run.
        expect: of the value (`first` − `second`, or their ratio): "above" or "below" the threshold; "within" it of 0
            (of 1 for a ratio); "same": the 95 % interval contains 0 (1), however small an effect may be.
        threshold: see `expect`.
        form: "difference" or "ratio" (first / second) of the two arms in one seed.
        judged: what must lie on the expected side: the whole "interval" of the mean, the value of "every seed", or
            just the "mean", as the source words it.
        robust: whether the source holds it for robust: asserted in the tests marked slow. Others are reported only.
        reported: what the source measured, as it says it.
        source: paper or specification.
    """

    method: str
    says: str
    first: str
    second: str | None
    measure: str
    expect: Expect
    threshold: float = 0.0
    form: Literal["difference", "ratio"] = "difference"
    judged: Judged = "interval"
    robust: bool = False
    reported: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.second is None and (self.form == "ratio" or self.expect == "same"):
            raise ValueError(f"claim {self.says!r}: a ratio, or 'same', needs a second arm")
        if self.expect == "same" and self.judged != "interval":
            raise ValueError(f"claim {self.says!r}: 'same' is judged by the interval, got {self.judged!r}")

    @property
    def wording(self) -> str:
        """What is expected of the value, in words: `ratio below 0.5 (interval)`."""
        value = self.form if self.second is not None else "value"
        neutral = 1 if self.form == "ratio" else 0
        if self.expect == "same":
            return f"{value}: interval contains {neutral}"
        centre = f" of {neutral}" if self.expect == "within" else ""
        return f"{value} {self.expect} {self.threshold:g}{centre} ({self.judged})"

    def holds(self, value: float) -> bool:
        """Whether one value lies on the expected side."""
        neutral = 1.0 if self.form == "ratio" else 0.0
        if self.expect == "above":
            return value > self.threshold
        if self.expect == "below":
            return value < self.threshold
        return abs(value - neutral) <= self.threshold


@dataclass(frozen=True)
class Source:
    """Where claims about a method come from; makes them.

    Attributes:
        method, source: of every claim, see `Claim`.
    """

    method: str
    source: str

    def claim(self, says: str, first: str, second: str | None, measure: str, expect: Expect, **more: Any) -> Claim:
        """A claim that is reported; `more` are other fields of `Claim`."""
        return Claim(self.method, says, first, second, measure, expect, **{"source": self.source, **more})

    def sure(self, says: str, first: str, second: str | None, measure: str, expect: Expect, **more: Any) -> Claim:
        """A claim that the source holds for robust, judged in every seed unless `more` says otherwise."""
        return self.claim(says, first, second, measure, expect, **{"robust": True, "judged": "every seed", **more})


@dataclass(frozen=True)
class Arm:
    """A training setting of a group.

    Attributes:
        name: unique in its group.
        method: what it is an example of; `--method` runs these arms and those that chosen claims compare with.
        settings: whatever the group's `run` reads; part of what identifies a finished run.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SeedAndSizes(Generic[Sizes]):
    """Context of an experiment whose arms share nothing else: `prepare=SeedAndSizes`."""

    seed: int
    scale: Sizes


@dataclass(frozen=True)
class Group:
    """An experiment with its claims.

    Attributes:
        name, title: for options and for headings.
        setting: what is done, in a paragraph.
        scales: sizes of the full and of the quick version, two dataclasses of one kind.
        arms: all training settings.
        claims: what is compared.
        prepare: `(seed, scale) -> context`: data and models that the arms of a seed share. Deterministic.
        run: `(context, arm) -> measures` of one run. Deterministic; arms do not depend on one another.
        columns: measure -> heading of the table of runs.
        remarks: results of this group -> paragraphs to print below its tables.
    """

    name: str
    title: str
    setting: str
    scales: tuple[Any, Any]
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    prepare: Callable[[int, Any], Any]
    run: Callable[[Any, Arm], Measures]
    columns: Mapping[str, str]
    remarks: Callable[[Sequence[Mapping[str, Any]]], list[str]] = lambda results: []

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        for claim in self.claims:
            for arm in (claim.first, claim.second):
                if arm is not None and arm not in names:
                    raise ValueError(f"group {self.name}: claim {claim.says!r} names no arm of it: {arm!r}")
            if claim.measure not in self.columns:
                raise ValueError(f"group {self.name}: claim {claim.says!r} is about no column: {claim.measure!r}")

    @property
    def methods(self) -> list[str]:
        """The methods that it has claims about."""
        return sorted({claim.method for claim in self.claims})

    def chosen(self, methods: Sequence[str] | None) -> tuple[list[Arm], list[Claim]]:
        """Arms and claims of these methods, with the arms that the claims compare them with (None: all)."""
        if methods is None:
            return list(self.arms), list(self.claims)
        claims = [claim for claim in self.claims if claim.method in methods]
        compared = {name for claim in claims for name in (claim.first, claim.second)}
        return [arm for arm in self.arms if claims and (arm.method in methods or arm.name in compared)], claims

    def key(self, arm: Arm, quick: bool) -> str:
        """Identifies an arm with all its settings and sizes, for resuming."""
        return fingerprint([self.name, arm.name, dict(arm.settings), asdict(self.scales[quick])])


@dataclass(frozen=True)
class Finding:
    """A claim with what was measured.

    Attributes:
        group, claim: which.
        seeds: how many seeds have both arms.
        first, second: seed means of the two arms (`second` None for a claim about one arm).
        value: mean difference or ratio with its 95 % t interval, paired by seed; None with fewer than two seeds.
        higher: in how many seeds `first` is above `second` (above the threshold, for a claim about one arm).
        verdict: "seen", "not seen", "too few seeds".
    """

    group: str
    claim: Claim
    seeds: int
    first: float
    second: float | None
    value: Estimate | None
    higher: int
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        value = {"value": None, "low": None, "high": None} if self.value is None else self.value._asdict()
        own = {"group": self.group, **asdict(self.claim), "expected": self.claim.wording, "seeds": self.seeds}
        measured = {"first_mean": self.first, "second_mean": self.second, **value}
        return {**own, **measured, "higher_in": f"{self.higher}/{self.seeds}", "verdict": self.verdict}


def judge(group: str, claim: Claim, results: Sequence[Mapping[str, Any]]) -> Finding | None:
    """Hold a claim against the results of its group; None where no seed has what it needs.

    Args:
        results: measures of finished runs with their "group", "arm" and "seed". A seed counts if both arms have a
            finite measure (and a ratio a divisor that is not 0).
    """
    by_arm = {arm: _by_seed(results, group, arm, claim.measure) for arm in (claim.first, claim.second) if arm}
    seeds = sorted(set.intersection(*(set(values) for values in by_arm.values())))
    first = [by_arm[claim.first][s] for s in seeds]
    second = [by_arm[claim.second][s] for s in seeds] if claim.second is not None else None
    if claim.form == "ratio" and second is not None:
        kept = [i for i, divisor in enumerate(second) if divisor != 0]
        first, second = [first[i] for i in kept], [second[i] for i in kept]
    if not first:
        return None
    if second is None:
        values, base = first, [claim.threshold] * len(first)
    else:
        values = [a / b if claim.form == "ratio" else a - b for a, b in zip(first, second, strict=True)]
        base = second
    higher = sum(a > b for a, b in zip(first, base, strict=True))
    estimate = mean_of_runs(values) if len(values) > 1 else None
    means = fmean(first), None if second is None else fmean(second)
    return Finding(group, claim, len(values), *means, estimate, higher, _verdict(claim, values, estimate))


def _by_seed(results: Sequence[Mapping[str, Any]], group: str, arm: str, measure: str) -> dict[int, float]:
    mine = [r for r in results if r["group"] == group and r["arm"] == arm]
    values = {r["seed"]: r["measures"].get(measure) for r in mine}
    return {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}


def _verdict(claim: Claim, values: Sequence[float], estimate: Estimate | None) -> Verdict:
    if estimate is None:
        return "too few seeds"
    if claim.expect == "same":
        seen = estimate.low <= (1.0 if claim.form == "ratio" else 0.0) <= estimate.high
    elif claim.judged == "every seed":
        seen = all(claim.holds(value) for value in values)
    elif claim.judged == "mean":
        seen = claim.holds(estimate.value)
    else:
        seen = claim.holds(estimate.low) and claim.holds(estimate.high)
    return "seen" if seen else "not seen"
