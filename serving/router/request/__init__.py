"""What a request asks for: parsed, checked, its images measured."""
