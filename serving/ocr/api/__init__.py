"""The OCR service's HTTP API."""
