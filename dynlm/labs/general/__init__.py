"""A general-purpose optimizer, meta-trained on small training tasks."""
