"""How a command runs the steps of a workflow: options, connections, output and exit code."""
