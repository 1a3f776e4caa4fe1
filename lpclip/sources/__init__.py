"""Image sources, one file for each kind; `lpclip.images` is the way in."""
