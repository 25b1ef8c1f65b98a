"""How a command brings the steps of a workflow to done: what it takes, what it connects to, what it ends with."""
