"""Which draft to ask for: costs, expected gains, policies."""
