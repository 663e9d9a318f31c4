"""Access to this process and machine: device, ranks, signals, clock, files, extension."""
