"""Kernels for a GPU, each with a torch path that gives the same answer and is what it is tested against."""
