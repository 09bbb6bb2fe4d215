"""Kernels of our own for CPU, in C++, compiled on the machine that runs them."""
