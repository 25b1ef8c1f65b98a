"""One module per verb of the command line: its arguments, what it does and what it prints."""
