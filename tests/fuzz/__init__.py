"""Coverage-guided fuzzing of everything that parses, and mutated requests on the gateway's socket.

    .venv/bin/python -m tests.fuzz [TARGET ...] --executions 100000
    .venv/bin/python -m tests.fuzz.http --requests 50000

Inputs are made by code in `targets`; each that once failed is kept in `regressions/TARGET/`.
"""
