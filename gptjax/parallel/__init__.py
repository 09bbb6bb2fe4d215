"""Meshes, the one partitioning table, and hosts."""
