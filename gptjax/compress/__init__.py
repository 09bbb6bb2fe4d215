"""Smaller models from trained ones: few bits, fewer weights, shared layers, and a teacher's help."""
