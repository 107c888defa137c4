"""What every HTTP service here is made of: bounds on what clients send, their presence, and a way to leave them."""
