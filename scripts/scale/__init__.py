"""Runs of several processes, compared with one: see README.md."""
