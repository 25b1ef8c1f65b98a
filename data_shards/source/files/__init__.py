"""The files of an image set in a folder, a tar, a zip, or below a prefix of an object store."""
