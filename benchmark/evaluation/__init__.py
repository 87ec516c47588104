"""The whole evaluation as stages that are done once each, in one directory, with the time they take."""
