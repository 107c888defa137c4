"""What a model wrote, as layout, markdown and plain text."""
