"""Audits of losslessness: whether a target with a drafter and an acceptance rule writes the target's own text."""
