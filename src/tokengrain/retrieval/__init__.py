"""Generative retrieval: docids, search among them, negatives, and metrics of rankings."""
