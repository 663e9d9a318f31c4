"""What a YAML file may say."""
