"""One file per change; names sort in order."""
