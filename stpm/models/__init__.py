"""Fitted models: their records and the store that keeps them."""
