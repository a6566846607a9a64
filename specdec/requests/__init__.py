"""Requests: a checked call, and the state of its rows."""
