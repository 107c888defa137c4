"""`python -m benchmarks.rehearsal`: the overlay `cpu-dev` on a Ray cluster of several nodes, without Kubernetes."""
