"""Offline: item vectors out of events, and what they find."""
