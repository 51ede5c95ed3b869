"""The judge against a stub server."""

import json
import threading
import time

import pytest

from tests.rewards.test_suite import WORDS, rollouts
from tests.rollout.stub import serving
from tokengrain.errors import RecipeError, RunError
from tokengrain.rewards.builtin import check_reward, make_reward
from tokengrain.rewards.suite import RewardError, RewardSuite
from tokengrain.settings import code_named_by, trust_run_code

SCORES = dict(zip(WORDS, (1, 5.5, 10, 7)))


def chat(path, body):
    text = body["messages"][-1]["content"]
    score = next((s for w, s in SCORES.items() if f"Answer:\n{w}\n" in text), "?")
    content = "I cannot say." if score == "?" else f"Not [[3]] but [[{score}]]"
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


def judge(stub, **settings):
    return make_reward("judge", **{"url": stub.url, "model": "m", "backoff": 0.01, "retries": 2, **settings})


def score(reward, texts=WORDS):
    return RewardSuite([reward]).score(rollouts(), texts=texts)


def test_scores():
    with serving(chat) as stub:
        result = score(judge(stub, system="Be strict.", weight=2.0))
        assert result.total.tolist() == pytest.approx([0, 1, 2, 2 * 6 / 9])
        assert result.counts == {"judge/requests": 4, "judge/cached": 0}
        path, body = stub.requests[0]
    assert path == "/v1/chat/completions"
    assert body["messages"][0] == {"role": "system", "content": "Be strict."}
    assert "Prompt:\np" in body["messages"][1]["content"]
    assert body["temperature"] == 0


def test_cache(tmp_path):
    with serving(chat) as stub:
        first = score(judge(stub, cache=str(tmp_path)))
        again = score(judge(stub, cache=str(tmp_path)))
        assert len(stub.requests) == 4
        score(judge(stub, cache=str(tmp_path), temperature=0.5))
        assert len(stub.requests) == 8
    assert again.total.tolist() == first.total.tolist()
    assert again.counts == {"judge/requests": 0, "judge/cached": 4}
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 8
    assert all(p.suffix == ".json" and set(json.loads(p.read_text())) == {"request", "reply"} for p in files)
    temperature = json.loads(files[1].read_text())["request"]["temperature"]
    files[1].write_text("{")
    with serving(chat) as stub, pytest.raises(RewardError, match=r"is no answer of a judge .*remove it"):
        score(judge(stub, cache=str(tmp_path), temperature=temperature))


def test_equal_questions_are_asked_once():
    with serving(chat) as stub:
        result = score(judge(stub), texts=[WORDS[0], WORDS[0], WORDS[2], WORDS[2]])
        assert len(stub.requests) == 2
    assert result.total.tolist() == [0, 0, 1, 1]


def test_concurrency_is_bounded():
    with serving(chat) as stub:
        stub.delay = 0.05
        score(judge(stub, concurrency=2))
        assert stub.most_busy == 2


def test_concurrency_does_not_depend_on_the_machine(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("os.process_cpu_count", lambda: 1, raising=False)
    texts = [f"text {i}" for i in range(12)]
    barrier = threading.Barrier(12)

    def together(path, body):
        barrier.wait(10)  # broken unless all twelve are asked at a time
        return {"choices": [{"message": {"content": "[[10]]"}}]}

    with serving(together) as stub:
        reward = judge(stub, concurrency=12, retries=0)
        result = RewardSuite([reward]).score(rollouts(texts), texts=texts)
    assert result.total.tolist() == [1.0] * 12


def test_a_reply_without_a_score_is_kept_where_it_would_be_the_same_again(tmp_path):
    replies = iter(["Well.", "[[10]]", "Well."])

    def answer(path, body):
        return {"choices": [{"message": {"content": next(replies)}}]}

    texts = [WORDS[0]] * 4
    with serving(answer) as stub:
        one = {"cache": str(tmp_path), "question": "{completion}", "on_error": "skip"}
        warm = judge(stub, temperature=0.5, **one)
        assert not score(warm, texts).valid.any()
        assert score(warm, texts).total.tolist() == [1.0] * 4
        assert score(warm, texts).counts["judge/cached"] == 1
        cold = judge(stub, **one)
        assert not score(cold, texts).valid.any()
        assert not score(cold, texts).valid.any()
        assert len(stub.requests) == 3


def test_a_time_out_does_not_wait_for_the_server():
    def slow(path, body):
        time.sleep(3)
        return chat(path, body)

    with serving(slow) as stub:
        started = time.monotonic()
        assert not score(judge(stub, timeout=0.3, on_error="skip")).valid.any()
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("fault", [500, "garbage", "hang", "drop"])
def test_passing_faults_are_retried(fault):
    with serving(chat) as stub:
        stub.faults[:] = [fault, fault]
        assert score(judge(stub, seconds=0.2, concurrency=1)).total[2] == 1


def test_lasting_faults_follow_the_policy(tmp_path):
    with serving(chat) as stub:
        stub.faults[:] = [400]
        with pytest.raises(RewardError, match=r"'judge': row r0 \(completion 0\): the judge gave no answer.*fault 400"):
            score(judge(stub, concurrency=1))
        stub.faults[:] = [400]
        result = score(judge(stub, concurrency=1, on_error="skip", cache=str(tmp_path)))
        assert result.valid.tolist() == [False, True, True, True]
        assert len(list(tmp_path.rglob("*.json"))) == 3, "what failed is not kept"
        with pytest.raises(RewardError, match=r"row r1 \(completion 3\): the judge's reply has no score from 1 to 10"):
            score(judge(stub), texts=[*WORDS[:3], "other"])
        with pytest.raises(RewardError, match="from 1 to 5"):
            score(judge(stub, high=5.0))


def test_settings():
    good = {"url": "http://x", "model": "m"}
    for settings, message in (
        ({"url": "x"}, "http://"),
        ({"low": 2, "high": 2}, "low < high"),
        ({"question": "hm"}, "no {completion}"),
        ({"question": "{completion"}, "double a brace"),
        ({"pattern": "x"}, "0 groups"),
        ({"concurrency": 0}, "concurrency = 0"),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE"),
    ):
        with pytest.raises(RecipeError, match=message):
            make_reward("judge", **{**good, **settings})
        if "api_key_env" not in settings:
            with pytest.raises(RecipeError, match=message):
                check_reward("judge", {**good, **settings})
    check_reward("judge", {**good, "api_key_env": "NO_SUCH_VARIABLE"})  # the key need not be there yet
    with serving(chat) as stub, pytest.raises(RewardError, match=r"the question names \['rubric'\]"):
        score(judge(stub, question="{rubric} {completion}"))


def test_a_run_folder_that_is_not_trusted_reaches_no_server(tmp_path, monkeypatch):
    """Its recipe could name any server, and any variable of this process as the key that it gets."""
    monkeypatch.setenv("SOME_SECRET", "s3cret")
    recipe = tmp_path / "recipe.yaml"
    with serving(chat) as stub:
        with (
            code_named_by(recipe),
            pytest.raises(RunError, match=r"names the server .*would be used now") as no,
        ):
            score(judge(stub, api_key_env="SOME_SECRET"))
        assert not stub.requests
        assert "s3cret" not in str(no.value)
        with code_named_by(recipe), trust_run_code(True):
            assert score(judge(stub)).total[2] == 1
