"""Limits on what one tenant may use of the service: turns, shares, disk space."""
