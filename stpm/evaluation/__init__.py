"""Evaluation: from scored, labelled images to figures, a report and pictures."""
