"""Interactions from files and data sets onto topics."""

from stream.extras import need_worker

need_worker(__name__)
