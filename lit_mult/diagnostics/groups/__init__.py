"""Groups of diagnostics: one `Group` per module. The file names are the choices of `train.diagnostics`."""
