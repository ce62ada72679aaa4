"""Offline: item vectors out of events, and what they find."""

from stream.extras import need_worker

need_worker(__name__)
