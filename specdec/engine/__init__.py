"""Many requests at once: rows that come and go between rounds."""

from specdec.engine.engine import Engine
from specdec.engine.handle import Handle

__all__ = ["Engine", "Handle"]
