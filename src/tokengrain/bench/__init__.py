"""Benchmarks: whether a credit is right (`tokengrain bench credit`), and which claims hold (`bench claims`)."""
