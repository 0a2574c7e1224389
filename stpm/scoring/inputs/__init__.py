"""Where images come from: sources become the rows of a manifest."""
