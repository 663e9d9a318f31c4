"""Random numbers as a function of (seed, id, step)."""
