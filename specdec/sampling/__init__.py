"""Scores, draws and their noise."""
