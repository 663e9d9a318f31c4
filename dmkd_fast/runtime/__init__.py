"""This process and machine: device, ranks, signals, clock, files, extension."""
