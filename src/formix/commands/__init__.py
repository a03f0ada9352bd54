"""The verbs of the command line, one file each; `formix.cli` names them."""
