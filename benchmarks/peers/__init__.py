"""The same job in other frameworks, each as its own documentation has it done.

A peer listens on 127.0.0.1 at the port in BENCHMARK_PORT, takes a JPEG as the body and answers with
the five best classes. What to classify with comes from BENCHMARK_MODEL_DIR, an unpacked archive,
and BENCHMARK_ENGINE: classifier.py reads both.
"""
