"""Rows of text -> samples of token ids: formats, chat templates, the seam, truncation, rewards."""
