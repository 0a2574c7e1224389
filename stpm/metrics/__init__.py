"""Metrics of labelled scores and maps, as pure functions: AUROC, AUPRO, intervals."""
