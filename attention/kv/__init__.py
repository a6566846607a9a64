"""KV memory: pages, their owners, writes, moves and 8-bit storage."""
