"""What the OCR API sends and accepts, defined once for the service, its clients and the OpenAPI document."""
