"""The version of this package, for modules that its root imports."""

__version__ = "0.1.0"
