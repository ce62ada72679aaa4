"""The wire: Faust's transport and producer, topics and access, logs, the schema registry, the embedded broker."""
