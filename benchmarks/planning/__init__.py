"""`python -m benchmarks.planning`: what `serving plan` counts with, and whether its simulation comes true."""
