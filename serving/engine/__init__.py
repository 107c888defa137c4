"""Engine replicas (vLLM inside a Ray Serve replica) and the directory that lists them."""
