"""Acceptance rules: which drafted tokens stay, and which token follows them. One short file a rule, all with one signature."""

from specdec.acceptance.base import Acceptance, AcceptanceRule
from specdec.acceptance.greedy import greedy
from specdec.acceptance.rejection import rejection

__all__ = ["Acceptance", "AcceptanceRule", "greedy", "rejection"]
