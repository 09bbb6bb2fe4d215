"""The one checkpoint format."""
