"""Feedback: images that a person marked as good change a category's model."""
