"""Token rewards in verl: what a credit source says of each token of a response, beside verl's reward of the whole.

verl's agent loop takes one number per response and writes it at the last token (`AgentLoopOutput.as_dict`). So the
reward manager `tokengrain_tokens` sends the tokens' numbers along with it, and the agent loops `tokengrain_single_turn`
and `tokengrain_tool` write them where verl's trainer reads rewards (`rm_scores`).

    TOKENGRAIN_VERL='{"token_rewards": {"credit": {"name": "reward_model", "model": "runs/qrm/reward/model"}}}'

Of RTO it is the guide's log-ratio: {"name": "guide", "model": DPO, "reference": SFT, "beta": 0.05, "clip": 0.05}.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tokengrain_verl import VARIABLE, settings
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.experimental.reward_loop.reward_manager import NaiveRewardManager
from verl.experimental.reward_loop.reward_manager import register as register_manager

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import RolloutError, require
from tokengrain.method import CREDIT, CreditSource
from tokengrain.models import load_model, load_trained_reward_model
from tokengrain.settings import Number, validate_settings
from tokengrain.specs import ModelSpec

TOKENS, OUTCOME = "tokengrain_token_rewards", "tokengrain_outcome"


@dataclass(frozen=True, kw_only=True)
class Rewarding:
    """The setting `token_rewards`."""

    credit: dict[str, Any]  # a credit source: its name and settings, with folders in the place of models
    outcome: Number = 1.0  # weight of verl's own reward, at the model's last token; 0: it is not asked for
    device: str | None = None  # of the models; None: cuda if the worker sees a GPU (verl gives it none), else cpu

    @classmethod
    def given(cls) -> Rewarding:
        own = settings(os.environ.get(VARIABLE, "")).get("token_rewards", {})
        return cls(**validate_settings(f"{VARIABLE}: token_rewards", cls, own))


def source_of(given: Mapping[str, Any], tokenizer: Any, device: str) -> CreditSource:
    """The credit source, with its models."""
    arguments = dict(given)
    kind = CREDIT.find(str(arguments.pop("name", None)))
    for name in kind.objects & arguments.keys():
        path = str(arguments[name])
        one = load_trained_reward_model(path) if kind.reward_model else load_model(ModelSpec(path=path), path).eval()
        arguments[name] = one.requires_grad_(False).to(device)
    return kind.make(**arguments, **({"tokenizer": tokenizer} if "tokenizer" in kind.objects else {}))


@register_manager("tokengrain_tokens")
class TokenRewards(NaiveRewardManager):
    """verl's `naive` reward manager, whose answer also has a reward for each token of the response."""

    def __init__(self, config: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, tokenizer, *args, **kwargs)
        own = Rewarding.given()
        self.outcome, self.device = own.outcome, own.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.source, self.lock = source_of(own.credit, tokenizer, self.device), threading.Lock()

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        found = await super().run_single(data) if self.outcome else {"reward_score": 0.0, "reward_extra_info": {}}
        tokens = await self.loop.run_in_executor(None, self.rewards, data[-1:])
        outcome = self.outcome * float(found["reward_score"])
        info = {**found["reward_extra_info"], TOKENS: tokens, OUTCOME: outcome}
        return {"reward_score": sum(tokens) + outcome, "reward_extra_info": info}

    def rewards(self, data: DataProto) -> list[float]:
        """The source's numbers for the tokens of one response."""
        mask, prompts = data.batch["attention_mask"][0].bool(), data.batch["prompts"][0]
        prompt, response = prompts[mask[: len(prompts)]], data.batch["responses"][0][mask[len(prompts) :]]
        batch = TokenBatch.from_samples([Sample(prompt.tolist(), [Completion(response.tolist())])]).to(self.device)
        with self.lock, torch.no_grad():  # verl asks for several responses at once
            values: list[float] = self.source(batch).tolist()
        return values


class TokenRewarded(AgentLoopOutput):
    """What an agent loop gives, with a reward for each token that the model wrote."""

    def as_dict(self) -> dict[str, Any]:
        info = dict(self.extra_fields.get("reward_extra_info") or {})
        # verl would take the rest of it for metrics.
        tokens, outcome = info.pop(TOKENS, None), info.pop(OUTCOME, 0.0)
        if tokens is not None:
            self.extra_fields["reward_extra_info"] = info
        output: dict[str, Any] = super().as_dict()
        if tokens is not None:
            here = len(output["response_mask"])
            what = f"{len(tokens)} token rewards for a response of {here} tokens; expected one for each"
            require(len(tokens) == here, RolloutError, what)
            own = output["response_mask"].bool()
            scores = torch.tensor(tokens).where(own, 0.0)
            scores[int(own.nonzero()[-1]) if own.any() else -1] += outcome  # a response may end with a tool's tokens
            output["rm_scores"] = scores
        return output


def rewarded(output: AgentLoopOutput) -> TokenRewarded:
    return TokenRewarded.model_construct(output.model_fields_set, **dict(output))


@register("tokengrain_single_turn")
class SingleTurn(SingleTurnAgentLoop):
    """verl's `single_turn_agent`."""

    async def run(self, *args: Any, **kwargs: Any) -> TokenRewarded:
        return rewarded(await super().run(*args, **kwargs))


@register("tokengrain_tool")
class Tool(ToolAgentLoop):
    """verl's `tool_agent`."""

    async def run(self, *args: Any, **kwargs: Any) -> TokenRewarded:
        return rewarded(await super().run(*args, **kwargs))
