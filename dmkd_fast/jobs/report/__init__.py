"""Pages about runs: results, curves, images, mistakes, time."""
