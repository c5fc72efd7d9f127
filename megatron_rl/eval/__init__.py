"""Benchmarks by the paper's protocol: sampling, grading, statistics, tables."""
