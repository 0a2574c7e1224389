"""Evaluation: from scored, labelled images to metrics, a report and pictures."""
