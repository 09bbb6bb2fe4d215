"""Peers' own implementations, which say what a model of theirs computes; each needs its package."""
