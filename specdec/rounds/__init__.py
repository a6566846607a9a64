"""Rounds: draft, verify, accept, commit; and the loop that runs them."""
