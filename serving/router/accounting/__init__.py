"""What a request may cost, did cost, and where that is recorded."""
