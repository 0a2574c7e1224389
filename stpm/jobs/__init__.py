"""What each command does. The benchmark fits, scores and evaluates, the nightly job scores and judges."""
