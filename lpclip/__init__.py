"""Linear probes on CLIP, trained without labels on CLIP's own pseudo-labels."""

__version__ = "0.1.0"
