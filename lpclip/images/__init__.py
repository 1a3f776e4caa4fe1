"""The images that `--data` names: sources, rows of bytes, pixels, views and class names."""
