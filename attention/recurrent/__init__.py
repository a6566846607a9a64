"""Layers with a recurrent state: their update rules, and forwards over states that can be rolled back."""
