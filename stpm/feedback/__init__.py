"""Feedback: images that a person marked as good join the calibration of a category's model."""
