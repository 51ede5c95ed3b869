"""Whatever a server answers, the sampler and the judge end in time, with one error that is clean."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.rewards.test_suite import WORDS, rollouts
from tests.security.evil import COMPLETIONS, JUDGE, RIGHT, TRANSPORT, Evil, evil
from tokengrain.errors import RolloutError
from tokengrain.rewards.builtin import make_reward
from tokengrain.rewards.suite import RewardError, RewardSuite
from tokengrain.rollout.sampler import PromptItem, SamplingConfig
from tokengrain.rollout.server import OpenAIServer

FAST = {
    *("redirect to another port", "redirect to a file", "status 400", "drop by drop", "cut off"),
    *("bomb of gzip", "bomb in a bomb", "gzip that is cut off"),
    *("no end", "brackets without end", "headers without end", "retry after 30 years"),
    *("one index twice", "log-probability of 400 digits", "id true", "megabytes of tokens", "names of 5000 digits"),
    *("score of 400 digits", "brackets for a slow pattern", "score behind megabytes"),
}


def modes(*kinds: dict[str, object]) -> list[object]:
    return [mode if mode in FAST else pytest.param(mode, marks=pytest.mark.slow) for kind in kinds for mode in kind]


@pytest.fixture(scope="module")
def server() -> Iterator[Evil]:
    with evil() as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL_KEY", "s3cret")


class _Vocabulary:
    def __len__(self) -> int:
        return 258


def sample(server: Evil, mode: str) -> list[list[int]]:
    sampler = OpenAIServer(
        server.url(mode), _Vocabulary(), model="m", timeout=0.8, retries=1, backoff=0.01, api_key_env="EVIL_KEY"
    )
    found = sampler.sample([PromptItem([1, 2], row="r7")], n=2, sampling=SamplingConfig(max_new_tokens=6))
    return [completion.ids for completion in found.groups[0]]


def clean(message: str, started: float) -> None:
    """Short, without the key and without what a terminal obeys, and in time: two attempts of 0.8 s and what they do."""
    assert time.monotonic() - started < 4
    assert len(message) < 1500
    assert "s3cret" not in message
    assert message.isprintable()


@pytest.mark.parametrize("mode", modes(TRANSPORT, COMPLETIONS))
def test_the_sampler_ends_with_one_error(server: Evil, mode: str) -> None:
    started = time.monotonic()
    with pytest.raises(RolloutError, match=r"^row r7: http://127") as error:
        sample(server, mode)
    clean(str(error.value), started)


@pytest.mark.parametrize("mode", RIGHT)
def test_what_a_server_may_answer(server: Evil, mode: str) -> None:
    assert [len(ids) for ids in sample(server, mode)] == [4, 4]


@pytest.mark.parametrize("mode", modes(TRANSPORT, JUDGE))
def test_the_judge_ends_with_one_error(server: Evil, mode: str) -> None:
    reward = make_reward(
        "judge", url=server.url(mode), model="m", seconds=0.8, retries=1, backoff=0.01, api_key_env="EVIL_KEY"
    )
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"judge") as error:
        RewardSuite([reward]).score(rollouts(), texts=WORDS)
    clean(str(error.value), started)


@pytest.mark.parametrize("mode", modes(TRANSPORT))
def test_asking_for_the_models_ends_with_one_error_or_an_answer(server: Evil, mode: str) -> None:
    started = time.monotonic()
    try:
        OpenAIServer(server.url(mode), model="m", timeout=0.8, retries=0, api_key_env="EVIL_KEY").check_reachable()
    except RolloutError as error:
        clean(str(error), started)
    else:
        assert mode in ("status 299", "plain text")
