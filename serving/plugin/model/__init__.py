"""The model and its processor, with vLLM's interfaces."""
