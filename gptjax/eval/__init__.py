"""Figures of quality, and the report that shows them."""
