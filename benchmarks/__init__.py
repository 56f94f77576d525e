"""Benchmarks: one module per question; run from the repository's root (see README.md)."""
