"""What requests cost. Integers only: a float appears in the answer's JSON and nowhere else."""
