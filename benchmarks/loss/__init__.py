"""Measurements of the distillation loss."""
