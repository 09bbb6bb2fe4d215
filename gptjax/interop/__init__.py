"""Models of other frameworks: in, out, and proof that nothing changed."""
