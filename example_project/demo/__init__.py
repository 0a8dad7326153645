"""Forty orders under fire: `python -m example_project.demo`."""
