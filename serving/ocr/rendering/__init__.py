"""Renders pages in separate processes."""
