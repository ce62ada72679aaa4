"""Key-value stores that retrieval reads: one protocol, one module per store."""
