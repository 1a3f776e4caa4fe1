"""A probe outside: in other programs, on servers and on hubs."""
