"""From YAML to recipes; every error names its line and column."""
