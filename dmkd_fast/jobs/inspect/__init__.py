"""Look at runs: reports of finished and running ones."""
