"""Resuming a run that was cut off: its state, its written rows, and the rows that remain."""
