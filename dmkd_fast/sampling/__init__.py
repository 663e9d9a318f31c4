"""Generate images by id: labels, solver tables and the sampling loop."""
