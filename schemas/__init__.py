"""The wire formats: JSON schema of events, Avro schema of embeddings, enums of reasons."""
