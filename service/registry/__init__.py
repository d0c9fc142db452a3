"""Weights that are on another machine: MLflow's registry and runs, object stores and the web.

Nothing here is imported by a command whose weights are a file. The clients are imported where they
are used (requirements-registry.txt).
"""
