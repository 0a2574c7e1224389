"""What a run has done so far, and what is left of it after it was killed."""
