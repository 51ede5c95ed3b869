"""What each node of `test_nodes` runs: a few slow steps of DPO in a folder that all share, resumed if it was begun."""

import json
import sys
import time

import torch
from transformers import TrainerCallback

from tests.training.tiny import make_samples, make_trainer, tiny_llama


class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(float(sys.argv[3]))


def main() -> None:
    torch.set_num_threads(1)
    trainer = make_trainer(
        sys.argv[1],
        make_samples(24),
        model=tiny_llama(dtype=torch.float64),
        objective="dpo",
        per_device_train_batch_size=8 // int(sys.argv[4]),
        max_steps=int(sys.argv[2]),
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        callbacks=[Slow()],
    )
    trainer.train(resume_from_checkpoint=True)
    print(json.dumps({"rank": trainer.accelerator.process_index, "step": trainer.state.global_step}), flush=True)


if __name__ == "__main__":
    main()
