"""Bounds of a temperature, for whoever checks one: without numpy, unlike the policies that have it."""

COLDEST, HOTTEST = 0.01, 100.0
"""Colder than this hardly ever explores, hotter is uniform."""
