"""The verb bench: the speed of networks and data loading on this machine, compared with alternatives."""
