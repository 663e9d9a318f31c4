"""The fused distillation loss."""
