"""Pages drawn by processes of their own."""
