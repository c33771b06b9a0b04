"""The step: the algorithm, what it needs of an engine, what it measures, and what interrupts it."""
