"""The jobs, each from its configuration to its files and tables."""
