"""Realistic users for `benchmarks/locustfile.py`: when they come, what they ask for, what they saw."""
