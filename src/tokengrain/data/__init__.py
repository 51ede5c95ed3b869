"""Rows of text -> samples of token ids: formats, chat templates, the prompt boundary, truncation, rewards."""
