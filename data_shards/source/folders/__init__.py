"""Image sets with a folder per class: `data.layout folders`."""
