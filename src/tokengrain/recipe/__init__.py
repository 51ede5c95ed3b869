"""Recipes: a YAML file read, merged and checked."""
