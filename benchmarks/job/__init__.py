"""Measurements of whole jobs and of the training step."""
