"""A stand-in at the engine's seam: answers in vLLM's shapes by a script."""
