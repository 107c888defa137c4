"""The model and its processor, as vLLM wants them."""
