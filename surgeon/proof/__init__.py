"""How far two models are apart, and where."""
