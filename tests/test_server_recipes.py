"""Online stages whose sampler is a server: real HTTP to a stub that samples from the weights it was told to load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.rollout.stub import Served, Stub, serving
from tests.test_cli import call
from tests.test_sampler_recipes import BRANCHING, log, online, same, trained
from tests.test_stages import LLAMA, run
from tests.training.online.tiny import make_online
from tokengrain.errors import DataError, RecipeError, RolloutError
from tokengrain.rewards.suite import RewardError
from tokengrain.run.runner import evaluate_run
from tokengrain.runs import read_run


def served_by(stub: Stub, **over: Any) -> dict[str, Any]:
    return {"name": "server", "url": stub.url, "model": "m", "backoff": 0.01, "retries": 1, "timeout": 20, **over}


def other_llama() -> Served:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = {k: v for k, v in LLAMA.items() if k != "model_type"}
    return Served(LlamaForCausalLM(LlamaConfig(vocab_size=258, **config)).eval())


def test_a_server_gets_the_present_weights_before_every_rollout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    served = other_llama()
    with serving(served) as stub:
        path.write_text(yaml.safe_dump(online(tmp_path, served_by(stub, refresh="checkpoint"))))
        status, _, err = call(capsys, "train", str(path))
        assert status == 0, err
        folder = str((tmp_path / "run" / "train" / ".sampler").resolve())
        assert served.loaded == [folder] * 6  # held-out prompts, four rollouts, held-out prompts
        assert any(path == "/v1/completions" for path, _ in stub.requests)
        stub.requests.clear()
        assert evaluate_run(tmp_path / "run", trust_run_code=True)["held_out"]["length"] > 0
        assert not stub.requests  # a finished model is sampled from here
        entries = log(tmp_path / "run")
        assert max(entry["mismatch/max_abs"] for entry in entries) < 1e-4
        final = {k: v for k, v in served.model.state_dict().items() if k in trained(tmp_path / "run")}
        assert same(final, trained(tmp_path / "run"))
        # The control: a server that keeps its weights is far from the policy.
        stale = run(online(tmp_path, served_by(stub, refresh="none"), name="stale"))
        assert min(entry["mismatch/max_abs"] for entry in log(stale.path)) > 1e-2
    assert not (tmp_path / "run" / "train" / ".sampler").exists()


def test_a_server_loads_adapters_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    lora = {"r": 2, "alpha": 4}
    served = other_llama()
    with serving(served) as stub:
        sampler = served_by(stub, refresh="adapter")
        first = run(online(tmp_path, "hf", name="base", training={"max_steps": 1, "use_cpu": True}))
        base = str(first.path / "train" / "model")
        served.model = type(served.model).from_pretrained(base)  # what a server is started with
        whole = run(online(tmp_path, sampler, name="whole", model=base, lora=lora))
        assert len(served.loaded) == 6
        assert served.adapters == {}  # nothing is left on the server
        assert max(entry["mismatch/max_abs"] for entry in log(whole.path)) < 1e-4
        (tmp_path / "calls").unlink()
        (tmp_path / "fault").write_text("4")
        with pytest.raises(RewardError, match="taken away"):
            run(online(tmp_path, sampler, name="parts", model=base, lora=lora))
        (tmp_path / "fault").unlink()
        # Another server, at another address, that is given the weights again; the seeds go with the requests.
        again = Served(type(served.model).from_pretrained(base))
        with serving(again) as moved:
            run(online(tmp_path, served_by(moved, refresh="adapter"), name="parts", model=base, lora=lora))
        assert len(again.loaded) == 3
        assert same(trained(tmp_path / "parts"), trained(tmp_path / "whole"))


def test_a_server_that_samples_from_another_model_stops_the_run(tmp_path: Path) -> None:
    served = other_llama()
    for parameter in served.model.parameters():
        parameter.data *= 8  # a distribution of its own
    served.reload = lambda body: {"results": [None]}  # it says that it has taken the weights
    with serving(served) as stub, pytest.raises(RolloutError, match=r"differ from the policy's by .* nats per token"):
        run(online(tmp_path, served_by(stub, refresh="checkpoint")))
    assert not log(tmp_path / "run")


def test_a_prompt_that_a_server_has_no_room_for(tmp_path: Path) -> None:
    served = other_llama()
    served.longest = 9
    with serving(served) as stub, pytest.raises(DataError, match=r"longer than the server's max_model_len"):
        run(online(tmp_path, served_by(stub, refresh="checkpoint")))
    assert not served.loaded


def test_branching_on_top_of_a_server(tmp_path: Path) -> None:
    served = other_llama()
    with serving(served) as stub:
        result = run(online(tmp_path, {**BRANCHING, "sampler": served_by(stub, refresh="checkpoint")}))
    assert len(served.loaded) == 6
    entries = log(result.path)
    assert max(entry["rollout/completions"] for entry in entries) > 12
    assert max(entry["mismatch/max_abs"] for entry in entries) < 1e-4


def test_a_wrong_address_is_named(tmp_path: Path) -> None:
    with serving(other_llama()) as stub:
        gone = served_by(stub, refresh="none")
    missing = rf"sampler 'server': {re.escape(stub.url)}/v1/models: .*[Rr]efused.* \(attempts: 2"
    with pytest.raises(RolloutError, match=missing):
        run(online(tmp_path, gone))
    assert read_run(tmp_path / "run").status == "failed"
    assert not (tmp_path / "run" / "train").exists()  # before any stage that trains
    branched = {**BRANCHING, "sampler": {**gone, "refresh": "checkpoint"}}
    with pytest.raises(RolloutError, match=missing):
        run(online(tmp_path, branched, name="other"))
    # The trainer asks as well: the first stage's model need not be there when the recipe is read.
    with pytest.raises(RolloutError, match=missing):
        make_online(tmp_path / "trainer", sampler=gone)


def test_a_dry_run_says_which_servers_do_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    with serving(other_llama()) as stub:
        path.write_text(yaml.safe_dump(online(tmp_path, served_by(stub, refresh="none"))))
        status, out, _ = call(capsys, "train", str(path), "--dry-run")
        assert status == 0
        assert "cannot begin" not in out
    status, out, _ = call(capsys, "train", str(path), "--dry-run")
    assert status == 0
    assert f"stage train cannot begin yet: sampler 'server': {stub.url}/v1/models" in " ".join(out.split())


def test_a_model_that_the_server_does_not_have(tmp_path: Path) -> None:
    with serving(other_llama()) as stub, pytest.raises(RecipeError, match=r"has no model 'mm'; did you mean 'm'\?"):
        run(online(tmp_path, served_by(stub, refresh="none", model="mm")))
