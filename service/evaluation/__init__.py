"""How often a model is right: ./scripts/evaluate."""
