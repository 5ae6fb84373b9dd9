"""Measuring answers: task files, metrics, reports."""
