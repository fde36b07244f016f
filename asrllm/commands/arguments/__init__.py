"""Arguments of the command line, by verb. Importing them loads neither torch nor numpy."""
