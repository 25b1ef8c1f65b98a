"""The verb bench: how fast networks and data are here, compared with what else a user would take."""
