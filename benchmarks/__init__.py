"""Measurements of time, memory and exactness: `python -m benchmarks`."""
