"""Parses and checks requests, and measures their images."""
