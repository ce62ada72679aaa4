"""The wire: Faust's transport and producer, topics and access, logs read whole, the schema registry, the embedded broker."""
