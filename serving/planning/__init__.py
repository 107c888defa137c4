"""How much hardware a load needs: figures with their sources, a simulation of the engines, and the sums over both."""
