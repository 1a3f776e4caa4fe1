"""The six commands, from flags to OUT."""
