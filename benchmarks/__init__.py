"""Benchmarks of resa-hf: `python -m benchmarks`."""
