"""Observations: what users have, their quality, and their operators."""
