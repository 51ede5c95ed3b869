"""Rewards that come with the library, and their settings."""

import gzip
import json
import math
import time
from pathlib import Path

import pytest

from tokengrain.errors import RecipeError
from tokengrain.rewards.builtin import REWARDS, Workers, check_reward, make_reward
from tokengrain.rewards.suite import RewardError, RewardFailure

DATA = Path(__file__).parents[3] / "shared" / "data"


def rewards(name, completions, settings=None, **columns):
    return make_reward(name, **(settings or {})).function(completions=completions, **columns)


def test_exact():
    texts = ["Paris", " Paris\n", "paris", "It is Paris"]
    assert rewards("exact", texts, answer=["Paris"] * 4) == [1, 1, 0, 0]
    settings = {"pattern": r"is (\w+)", "ignore_case": True, "wrong": -1.0, "column": "gold"}
    texts = ["it is Rome, no, it is PARIS", "Paris"]
    assert rewards("exact", texts, settings, gold=["Paris"] * 2) == [1, -1]


@pytest.mark.parametrize(
    ("style", "completion", "right"),
    [
        ("gsm8k", "so 5 + 67 = 72\n#### 72", True),
        ("gsm8k", "#### 71\nwait\n#### $72.00.", True),
        ("gsm8k", "the answer is 72", False),
        ("gsm8k", "#### 72 eggs of 100", True),
        ("gsm8k", "####", False),
        ("flexible", "the answer is 72.", True),
        ("flexible", "#### 71\nor 72", False),
        ("boxed", r"72 so \boxed{72}", True),
        ("boxed", r"\boxed{72} so \boxed{7}", False),
        ("boxed", "72", False),
        ("last", "12 eggs, 144/2", True),
        ("last", "72 and 0.5", False),
        ("last", "-72", False),
        ("last", "100-72", True),
        ("last", "\u221272", False),
        ("last", "100\u221272", True),
        ("last", "no number", False),
        ("last", "1/0", False),
    ],
)
def test_numeric(style, completion, right):
    for gold in ("reasoning 1 2\n#### 72", 72, 72.0, "72"):
        assert rewards("numeric", [completion], {"style": style}, answer=[gold]) == [float(right)]


def test_numeric_tolerance_and_commas():
    assert rewards("numeric", ["#### 1,234,567", "#### 1234567.0000001"], answer=["#### 1234567"] * 2) == [1, 1]
    assert rewards("numeric", ["#### 0.34"], {"tolerance": 0.01}, answer=["1/3"]) == [1]
    assert rewards("numeric", ["#### 0.34"], answer=["1/3"]) == [0]
    assert rewards("numeric", ["#### \u22125", "#### -5"], answer=["-5", "#### \u22125"]) == [1, 1]
    endless = "3" * 5000  # more digits than `int` reads
    assert rewards("numeric", [f"#### 1/{endless}", f"#### {endless}"], answer=["1", "1"]) == [0, 0]
    with pytest.raises(RewardError, match="the column 'answer' has no number; got 'none'"):
        rewards("numeric", ["#### 1"], answer=["none"])
    with pytest.raises(RewardError, match=r"needs the column 'answer'; the rows have \['gold'\]"):
        rewards("numeric", ["#### 1"], gold=["1"])


def test_gsm8k():
    path = DATA / "gsm8k-test.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no {path.name} in ../shared/data")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    assert set(rewards("numeric", answers, answer=answers)) == {1.0}
    others = [a.replace("#### ", "#### 1") for a in answers]
    assert set(rewards("numeric", others, answer=answers)) == {0.0}
    # Written without the commas, and as a plain column.
    golds = [a.rpartition("#### ")[2].replace(",", "") for a in answers]
    assert set(rewards("numeric", answers, answer=golds)) == {1.0}


def test_math():
    golds = [r"\frac{1}{2}", "x^2+2x+1", "{1,2,3}", r"$\boxed{3}$", "0.5"]
    texts = ["$0.5$", "$(x+1)^2$", r"$\{3,2,1\}$", r"so \boxed{4}", "no answer at all"]
    assert rewards("math", texts, answer=[golds[0], r"$x^2+2x+1$", r"$\{1,2,3\}$", *golds[3:]]) == [1, 1, 1, 0, 0]
    (failure,) = rewards("math", ["1"], answer=["?!"])
    assert isinstance(failure, RewardFailure)
    assert "understands no answer in the column 'answer': '?!'" in failure.what


def test_math_that_takes_too_long():
    reward = make_reward("math", seconds=0.5).function
    tower = "$" + "9^{" * 3 + "9" + "}" * 3 + "$"
    assert reward(completions=["$1$"], answer=["1"]) == [1.0]
    started = time.perf_counter()
    assert reward(completions=[tower, "$1$"], answer=["7", "1"]) == [0.0, 1.0]
    assert time.perf_counter() - started < 30
    assert reward.counts["timeouts"] <= 1


def test_answers_that_hang_cost_their_time_only():
    """They run at the same time, a process's start aside, and none takes the others down."""
    reward, hang = make_reward("math", seconds=1.0).function, "$9^{9^{9^{9^{9}}}}$"
    reward(completions=["$1$"] * 8, answer=["1"] * 8)  # the processes have started
    started = time.perf_counter()
    texts = [hang, "$5$", hang, hang, hang, "$5$"]
    assert reward(completions=texts, answer=["5"] * 6) == [0, 1, 0, 0, 0, 1]
    assert time.perf_counter() - started < 12
    assert reward.counts == {"timeouts": 4}
    failing = make_reward("math", seconds=1.0, on_timeout="fail").function
    (failure,) = failing(completions=[hang], answer=["5"])
    assert isinstance(failure, RewardFailure)
    assert "no answer within 1 s" in failure.what


def test_a_process_that_hangs_is_ended_and_replaced():
    workers = Workers("matches")
    good, evil = ["a+", 0, True, "aaa"], ["(a+)+b", 0, True, "a" * 40]
    assert workers.map([good], 5) == [True]
    started = time.perf_counter()
    first, second, third = workers.map([evil, good, ["a+", 0, True, "b"]], 0.3)
    assert isinstance(first, TimeoutError)
    assert (second, third) == (True, False)
    assert time.perf_counter() - started < 5
    (wrong,) = workers.map([["(", 0, True, "b"]], 5)
    assert isinstance(wrong, RewardError)
    assert "error" in str(wrong)
    while not workers._free.empty():
        workers._free.get().kill()
    assert workers.map([["b", 0, False, "abc"]], 5) == [True]
    process = workers._free.get()
    (child,) = children(process.pid)
    del workers
    process.stdin.close()  # as it does when nothing holds the processes any more
    process.wait(5)
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def children(pid):
    if not Path("/proc").is_dir():
        pytest.skip("no /proc to look for processes in")
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_format():
    good = "<think>a\nb</think>\n<answer>c</answer>"
    texts = [good, f" {good}\n", f"{good} and", good.replace("<think>", "", 1), "<think>" + good, ""]
    assert rewards("format", texts, prompt_ends=["..."] * 6) == [1, 1, 0, 0, 0, 0]
    assert rewards("format", texts) == [1, 1, 0, 1, 0, 0]  # the prompts, which may have opened it, are not known
    assert rewards("format", ["so #### 12"], {"pattern": r"#### \d+", "whole": False, "right": 0.5}) == [0.5]
    opened = ["...<think>\n", "...", "<think>"]  # by the chat template, at the end of the prompt
    texts = ["I add.</think>\n<answer>4</answer>"] * 2 + [good]
    assert make_reward("format").function(texts, prompt_ends=opened) == [1, 0, 1]
    slow = make_reward("format", pattern="(a+)+b", seconds=0.3).function
    slow(completions=["ab"])
    assert slow(completions=["a" * 40, "aab"]) == [0, 1]
    assert slow.counts == {"timeouts": 1}
    with pytest.raises(RecipeError, match="no regular expression"):
        make_reward("format", pattern="(")


def test_classification():
    texts = ["<answer>Dog</answer>", "<answer>dog or CAT</answer>", "<answer></answer>", "cat"]
    assert rewards("classification", texts, {"missing": -1.0}, label=["dog", "cat", "cat", "cat"]) == [1, 0, -1, -1]
    settings = {"labels": ["good", "very good", "bad"], "pattern": None, "missing": -1.0}
    texts = ["Not bad: very good!", "very good", "goods", "good. Or bad"]
    assert rewards("classification", texts, settings, label=["very good", "good", "good", "bad"]) == [1, 0, -1, 1]
    with pytest.raises(RewardError, match="the column 'label' is 'ugly'"):
        rewards("classification", ["bad"], settings, label=["ugly"])


def test_overlong():
    """DAPO eq. 13 at its corners: L_max 100, buffer 20."""
    reward = make_reward("overlong", max_length=100, buffer=20, factor=2.0).function
    lengths = [1, 80, 81, 90, 100, 130]
    assert reward(completion_ids=[[0] * n for n in lengths]) == pytest.approx([0, 0, -0.1, -1, -2, -2])
    with pytest.raises(RecipeError, match="at most max_length = 5"):
        make_reward("overlong", max_length=5, buffer=6)


def test_cosine():
    reward = make_reward("cosine", max_length=10, overlong=-9.0, settings={"style": "last"}).function
    lengths = [5, 10, 20, 5, 10, 10]
    ids = [[0] * n for n in lengths]
    texts, cut = ["1", "1", "1", "2", "2", "2"], [False] * 5 + [True]
    got = reward(completions=texts, completion_ids=ids, truncated=cut, answer=[1] * 6)
    assert got == pytest.approx([0.75, 0.5, 0.5, -0.75, -0.5, -9])
    (short,) = reward(completions=["1"], completion_ids=[[0]], truncated=[False], answer=[1])
    assert short == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 10)))
    with pytest.raises(RecipeError, match="unknown setting 'stile'; did you mean 'style'"):
        make_reward("cosine", max_length=10, settings={"stile": "last"})


def test_settings():
    checked = check_reward("numeric", {"weight": 2, "tolerance": 0.1})
    assert checked["weight"] == 2.0
    assert checked["style"] == "gsm8k"
    assert checked["on_error"] == "error"
    for name, settings, message in (
        ("numerik", {}, "unknown reward 'numerik'; did you mean 'numeric'"),
        ("numeric", {"tolerence": 1}, "unknown setting 'tolerence'; did you mean 'tolerance'"),
        ("numeric", {"tolerance": -1}, "tolerance = -1"),
        ("numeric", {"style": "x"}, "style = 'x'"),
        ("numeric", {"on_error": "ignore"}, "on_error = 'ignore'"),
        ("numeric", {"timeout": 0}, "timeout = 0"),
        ("overlong", {"max_length": 4}, "'buffer' is missing"),
        ("overlong", {"max_length": 0, "buffer": 1}, "max_length = 0"),
        ("exact", {"pattern": "x"}, "has 0 groups; expected one"),
        ("tests.rewards.test_builtin:plain", {"x": 1}, "unknown setting 'x'"),
    ):
        for use in (lambda n, s: make_reward(n, **s), check_reward):
            with pytest.raises(RecipeError, match=message):
                use(name, settings)
    assert all(kind.build.name == name for name, kind in REWARDS.items())


def plain(completions):
    return [float(len(c)) for c in completions]


class Scaled:
    def __init__(self, *, by: float = 2.0) -> None:
        self.by = by

    def __call__(self, completions):
        return [self.by * len(c) for c in completions]


def test_your_own(tmp_path):
    reward = make_reward("tests.rewards.test_builtin:plain", weight=3)
    assert (reward.name, reward.weight, reward.function(completions=["ab"])) == ("plain", 3.0, [2.0])
    scaled = make_reward("tests.rewards.test_builtin:Scaled", by=3, name="mine")
    assert (scaled.name, scaled.function(completions=["ab"])) == ("mine", [6.0])
    file = tmp_path / "my.py"
    file.write_text("def f(completions):\n    return [1.0] * len(completions)\n")
    assert make_reward(f"{file}:f").function(completions=["a"]) == [1.0]
    with pytest.raises(RecipeError, match="no callable 'plan'; did you mean 'plain'"):
        make_reward("tests.rewards.test_builtin:plan")
