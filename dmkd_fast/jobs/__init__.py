"""The jobs behind the verbs of the command line: a config comes in, files come out."""
