"""Parses the model's answers into layout, markdown and plain text."""
