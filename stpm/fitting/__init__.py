"""Fitting: from defect-free images of each category to its model, calibrated, in the model store."""
