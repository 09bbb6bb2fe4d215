"""One operation per file: a plain jnp reference and the fast paths beside it."""
