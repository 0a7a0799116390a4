"""YAML to recipes, every error with its line and column."""
