"""What an online run keeps in its checkpoints, and what makes a checkpoint this run's."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokengrain.errors import RunError
from tokengrain.rollout.registry import describe_sampler
from tokengrain.training.trainer import PreferenceTrainer

if TYPE_CHECKING:
    from tokengrain.rewards import RewardSuite
    from tokengrain.rollout import Sampler
    from tokengrain.training.counting import HostBatch
    from tokengrain.training.online.config import OnlineConfig
    from tokengrain.training.online.loop import RolloutLoop
    from tokengrain.training.online.record import RolloutRecord
    from tokengrain.training.online.step import CriticLike

CRITIC, BUFFER = "critic", "rollout"


class OnlineStateMixin(PreferenceTrainer):
    """Saves and restores the rollout loop, the critic and the record of completions."""

    if TYPE_CHECKING:  # what OnlineTrainer adds
        args: OnlineConfig
        rewards: RewardSuite | None
        critic: CriticLike | None
        loop: RolloutLoop
        record: RolloutRecord
        sampler: Sampler
        _described_steps: list[dict[str, Any]]
        _minibatch: HostBatch | None

    def _start_clean(self) -> None:
        if self.loop.index:
            raise RunError("this trainer has trained already; make a new one, or resume from its checkpoint")
        super()._start_clean()
        if self.is_world_process_zero():
            self.record.restart(0)

    def run_identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be this run's."""
        args = self.args
        return {
            **super().run_identity(),
            "credit": self._described_steps,
            "rewards": [[f.name, f.weight] for f in self.rewards.functions] if self.rewards is not None else None,
            "sampler": describe_sampler(self.sampler),
            "sampling": json.loads(json.dumps(asdict(args.sampling()))),  # as a checkpoint has it
            "correct_from": args.correct_from,
            "num_generations": args.num_generations,
            "prompts_per_rollout": args.prompts_per_rollout,
            "rollout_epochs": args.rollout_epochs,
            "critic": self.critic.describe() if self.critic is not None else None,
        }

    def save_extra(self, staged: Path) -> dict[str, Any]:
        """The loop's state, this rank's part of the rollout under way, and the critic."""
        if self._minibatch is not None and self.loop.buffer is not None:
            self.loop.buffer.put_back()  # saved because its loss was not finite: a resumed run meets it again
            self._minibatch = None
        self.loop.save_buffer(staged / BUFFER)
        if self.critic is not None and self.args.should_save:
            self.critic.save(staged / CRITIC)
        return {"loop": self.loop.state_dict(), "record": self.record.pending}

    def restore_extra(self, checkpoint: Path, extra: dict[str, Any]) -> None:
        """Take up what `save_extra` left."""
        self.loop.load_state_dict(extra["loop"])
        self.loop.load_buffer(checkpoint / BUFFER)
        if self.critic is not None:
            self.critic.load(checkpoint / CRITIC)
        if self.is_world_process_zero():
            self.record.restart(extra["loop"]["index"], extra["record"])


def described(step: Any) -> dict[str, Any]:
    """A step's name and its plain settings, taken before it has a state."""
    given = getattr(step, "given", None)
    plain = {k: v for k, v in vars(step).items() if v is None or isinstance(v, (bool, int, float, str))}
    # As it comes back from JSON, where tuples are lists.
    return {"name": step.name, **json.loads(json.dumps(plain if given is None else given, default=str))}
