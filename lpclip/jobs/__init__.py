"""The commands, from flags to OUT."""
