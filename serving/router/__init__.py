"""The OpenAI-compatible router in front of the engine replicas."""
