"""Load diffusion models in diffusers format as fast modules."""
