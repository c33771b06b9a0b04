"""Whose distribution the student is pulled towards."""
