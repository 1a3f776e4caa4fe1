"""Frozen dual encoders: pixels and texts to unit vectors, class names to the zero-shot head."""
