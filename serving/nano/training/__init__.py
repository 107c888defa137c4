"""Training the nano checkpoint; not a part of the distribution."""
