"""Tuning a schedule on the page."""
