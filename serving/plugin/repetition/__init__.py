"""Prevents a model from repeating itself: the n-gram guard and the loop stop."""
