"""Benchmarks of gatefuse, one file per question. See the docstring of each module for its use."""
