"""Measuring this machine, and keeping what was measured."""
