"""The fused distillation loss: operators, kernels and eager definition. Needs torch alone."""
