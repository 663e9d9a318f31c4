"""Measurements of the parts of a job, each alone."""
