"""What is known about a job before it runs, while it runs and afterwards."""
