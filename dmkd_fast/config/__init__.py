"""The settings that a YAML file may contain, with their types, ranges and defaults."""
