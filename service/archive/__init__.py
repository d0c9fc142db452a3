"""From weights and labels to a model archive."""
