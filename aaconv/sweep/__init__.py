"""Sweeps: many trials of one config, described once, run until all are there, and told in a table."""
