"""./scripts/replay: an answer computed again, and why it is another one now."""
