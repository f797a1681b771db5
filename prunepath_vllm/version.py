"""This package's version, apart from the package itself, which imports everything."""

__version__ = "0.2.0"
