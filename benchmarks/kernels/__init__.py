"""How kernels are tuned, and what they take of a GPU."""
