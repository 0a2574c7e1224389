"""The production line: nights of scoring, their verdicts and page, and feedback on false alarms.

It uses the core (method, data, detector, models, fitting, scoring, cluster) by public names alone, and the core never
imports it; pyproject.toml lists which modules of scoring it may import, and CI enforces that.
"""
