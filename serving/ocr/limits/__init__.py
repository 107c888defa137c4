"""What one tenant may hold of the service: turns, shares, disk."""
