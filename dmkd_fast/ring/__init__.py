"""The ring buffer of images on the training device."""
