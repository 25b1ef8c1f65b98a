"""Code that runs on each training worker: loop, DeepSpeed engine and state. The loop does not depend on Ray."""
