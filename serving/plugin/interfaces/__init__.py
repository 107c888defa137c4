"""What the plugin touches outside itself: interfaces that vLLM does not promise, and the metrics registry."""
