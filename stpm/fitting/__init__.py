"""Fitting: from defect-free images of each category to its student, calibrated, in the model store."""
