"""Random crops and mixing."""
