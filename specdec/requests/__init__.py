"""A checked call and the state of its rows."""
