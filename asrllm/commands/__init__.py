"""The verbs of the command line: `parsers` defines their arguments, one module each has `run`."""
