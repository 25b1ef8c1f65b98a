"""Image sets that a table describes: `data.layout table`."""
