"""Image sets that a table describes: `data.layout csv`."""
