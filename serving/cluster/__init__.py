"""Which replicas there are: the directory, its actor, and the versions of deployments."""
