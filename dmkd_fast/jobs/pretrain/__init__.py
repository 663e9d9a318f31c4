"""Train teachers and denoisers: `dmkd pretrain`."""
