"""What `--data` names: sources, rows of bytes, pixels, views, class names."""
