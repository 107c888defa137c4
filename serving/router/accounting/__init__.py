"""What a request may cost and did cost, and its record in the ledger."""
