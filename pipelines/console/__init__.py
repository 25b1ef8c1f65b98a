"""Options of the command line, output on the terminal, and log files."""
