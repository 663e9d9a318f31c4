"""Measurements that are of a GPU alone; benchmarks/gpu.sh runs them."""
