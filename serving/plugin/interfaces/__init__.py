"""What the plugin uses outside itself: interfaces of vLLM without a promise of stability, and the metrics registry."""
