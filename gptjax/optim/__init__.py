"""Schedules, parameter groups and gradient transformations."""
