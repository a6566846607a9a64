"""Parts that the networks of learned drafters share."""
