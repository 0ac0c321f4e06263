"""Side projects: they use the core, which never uses them."""
