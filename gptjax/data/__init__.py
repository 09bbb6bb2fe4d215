"""From text on disk to packed rows of tokens, addressed by arithmetic."""
