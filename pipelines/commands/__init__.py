"""What each verb of the command line does, and what it prints."""
