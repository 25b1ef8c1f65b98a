"""A sweep: its trials as JSON in the store, what is tried next, and the seams to Ray Tune, which keeps nothing."""
