"""What the stack costs and how fast it is: each figure beside a peer's and beside the floor that nothing can beat."""
