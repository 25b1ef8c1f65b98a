"""Stored predictions -> figures, tables and pages; needs no GPU and no images."""
