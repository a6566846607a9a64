"""Choosing what to draft: costs, expected gains, tree search, policies."""
