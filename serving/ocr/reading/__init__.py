"""Reads the pages of a document through the router."""
