"""``uemb verify``: topics and store against the laws."""
