"""The image classifier that runs inside a TorchServe worker, and inside its model archive."""
