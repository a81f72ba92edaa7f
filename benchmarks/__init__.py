"""Measurements: each module is a program of its own, and none is part of what is served."""
