"""Kills parts of a running stack under load, again and again, and says what clients saw of it."""
