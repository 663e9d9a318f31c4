"""Save and resume objects that have a `state_dict`."""
