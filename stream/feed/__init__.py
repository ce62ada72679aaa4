"""Interactions from files and data sets onto topics."""
