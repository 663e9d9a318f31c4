"""What each verb of the command line does: a config comes in, files come out."""
