"""The stages of a run directory: each takes a recipe, works from the files of the one before, and gives its figures."""
