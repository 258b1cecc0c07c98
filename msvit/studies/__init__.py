"""Sets of runs that answer a question: what the notebooks are made of."""
