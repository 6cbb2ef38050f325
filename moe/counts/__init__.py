"""Parameters and FLOPs of a model in closed form, from its config alone; imports no torch."""
