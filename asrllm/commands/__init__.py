"""The verbs of the command line: `parsers` has their arguments, one module each has `run`."""
