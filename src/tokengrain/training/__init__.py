"""Training: `PreferenceTrainer`, a thin subclass of `transformers.Trainer`, and its settings.

trainer = PreferenceTrainer(model, PreferenceConfig("out"), objective="dpo", train_dataset=pairs)
trainer.train()

Importing this package imports transformers.
"""
