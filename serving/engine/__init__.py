"""Engine replicas: vLLM inside a Ray Serve replica, or the scripted engine."""
