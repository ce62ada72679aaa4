"""``uemb bench``: what the worker does per second, beside a plain Faust agent on the same broker in the same run."""
