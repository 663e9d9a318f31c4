"""Images by id: labels, solver tables, the sampling loop."""
