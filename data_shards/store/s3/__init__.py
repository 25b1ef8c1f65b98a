"""Objects in a bucket of S3, through a network that fails."""
