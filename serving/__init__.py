"""A serving stack for DeepSeek-OCR: vLLM engines in Ray Serve replicas, an OpenAI-compatible router, accounting."""
