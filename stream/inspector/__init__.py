"""A page that shows how fresh vectors are, and why a user has the one that they have; it reads, and never writes."""
