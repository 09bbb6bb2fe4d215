"""Implementations of other frameworks, each in a file of its own, as judges of what was exported."""
