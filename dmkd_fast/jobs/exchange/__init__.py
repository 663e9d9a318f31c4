"""Networks out and in: `dmkd predict`, `dmkd export`, `dmkd import`."""
