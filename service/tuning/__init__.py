"""The search for the fastest configuration."""
