"""The four jobs: each composes fitting, scoring and evaluation into one command."""
