"""Starts learned by the MAML family, on few-shot tasks."""
