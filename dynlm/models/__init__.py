"""Base language models, their training, and the view of their adapted parameters."""
