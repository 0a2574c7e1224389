"""Resuming a run that was cut off: the rows that are written, and those that remain."""
