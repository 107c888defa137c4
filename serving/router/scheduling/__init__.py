"""Decides which request is next and which replica gets it."""
