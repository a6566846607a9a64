"""Kernels in C for a CPU: where a step's time is what surrounds its arithmetic, not the arithmetic."""
