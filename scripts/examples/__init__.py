"""Four short programs, one for each thing to learn; all run on a CPU with the shipped models."""
