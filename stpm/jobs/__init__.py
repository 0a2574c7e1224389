"""What each command does. The benchmark fits, scores and evaluates; the others do one of these, or manage models."""
