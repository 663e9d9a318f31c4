"""Train teachers and denoisers."""
