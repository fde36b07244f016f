"""The verbs of the command line: `arguments` defines their arguments, one module each has `run`."""
