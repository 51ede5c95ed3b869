"""Experiments on the methods: not part of the package."""
