"""The verbs of the command line: a module with `run` for each. `arguments` has their arguments."""
