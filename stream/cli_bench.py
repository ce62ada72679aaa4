"""``uemb bench``: measures the worker on the broker that the settings name."""
