"""Build, load, save and combine classifiers: teachers and students."""
