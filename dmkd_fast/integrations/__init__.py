"""Connections to other frameworks; each file imports its framework, and nothing imports them."""
