"""The command ``uemb doctor``."""
