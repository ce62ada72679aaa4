"""The networked store: one Redis or Valkey, or a cluster of them."""
