"""A stream of user embeddings: Kafka events in, versioned vectors out."""
