"""The report: benchmarks/README.md and its plots, made of nothing but the files in benchmarks/results/."""
