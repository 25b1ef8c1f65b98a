"""How commands talk to users: their options, what is on the terminal, and what goes into a log instead."""
