"""What each of the four commands does. The benchmark fits, scores and evaluates; the others do one of these."""
