"""nginx in front of one or more TorchServes."""
