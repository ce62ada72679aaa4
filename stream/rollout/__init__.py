"""Another item version or encoder, without downtime."""
