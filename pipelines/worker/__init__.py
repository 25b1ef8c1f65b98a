"""What runs on each training worker: the loop, the engine (DeepSpeed), the state. The loop knows no Ray."""
