"""The directory of replicas, its Ray actor, and the versions of deployments."""
