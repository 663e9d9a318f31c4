"""Diffusion models in diffusers format, as fast modules."""
