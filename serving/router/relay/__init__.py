"""Relays requests to replicas and OCR services, and their answers to clients."""
