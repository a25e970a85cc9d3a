"""Files that potentials come in: our own model file and those of others."""
