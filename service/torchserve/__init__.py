"""TorchServe as a process, and the Java that it runs in."""
