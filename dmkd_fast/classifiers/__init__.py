"""Teachers and students: build, load, save, combine."""
