"""Prompts of the classes of a text-to-image model, and what its encoders make of them."""
