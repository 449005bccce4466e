"""Bytes, milliseconds and quality of one candidate. Knows nothing about searches."""
