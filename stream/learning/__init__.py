"""Offline: item vectors out of events."""
