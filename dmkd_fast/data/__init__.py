"""Read images from disk: list, decode, shards, test sets."""
