"""Images on disk: list, decode, shards, test sets."""
