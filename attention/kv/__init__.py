"""What keys and values are stored in: pages, writes, moves, 8-bit numbers."""
