"""One file per change; names sort in their order."""
