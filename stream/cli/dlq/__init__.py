"""``uemb dlq``: dead letters are listed, shown and replayed."""
