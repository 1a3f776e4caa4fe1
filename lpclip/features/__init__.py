"""Ray Data: every image is read, decoded and encoded once, into a store."""
