"""Documents that are read while nobody waits."""
