"""Documents that are read in the background."""
