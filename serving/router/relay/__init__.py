"""Bytes to a replica or an OCR service and back."""
