"""Prices, the ledger, budgets and reports. Integers only: floats appear in the answers' JSON and nowhere else."""
