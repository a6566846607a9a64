"""Statistics of generations, and their figures and tables."""
