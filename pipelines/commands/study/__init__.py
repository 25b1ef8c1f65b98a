"""An evaluation's study on the terminal."""
