"""Adapters for other frameworks. Each file imports its framework; no other package imports it."""
