"""What the HTTP services share: limits on requests, detection of disconnected clients, graceful shutdown."""
