"""HAProxy in front of engine replicas that check requests themselves."""
