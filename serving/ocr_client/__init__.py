"""Clients of the OCR service: a library, and the bulk run behind `serving ocr`."""
