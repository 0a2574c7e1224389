"""Scoring: from a manifest of images to one Parquet row and one heatmap each."""
