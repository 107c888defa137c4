"""Whose turn it is and which replica gets it."""
