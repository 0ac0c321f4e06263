"""dynlm: language models that keep learning while they read."""

__version__ = "0.1.0"
