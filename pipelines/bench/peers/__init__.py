"""Loaders, writers and networks of other projects, for comparison; imported only on request."""
