"""Capacity planning: figures with their sources, a simulation of the engines, and the calculation based on both."""
