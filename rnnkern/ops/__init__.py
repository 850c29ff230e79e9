"""Operators: their fake kernels, autograd formulas and the choice of a backend."""
