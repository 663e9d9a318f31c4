"""Measurements: `python -m benchmarks NAME [--record]`, run from a checkout."""
