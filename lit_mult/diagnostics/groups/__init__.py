"""The groups of diagnostics, a module each: its file name is the group's name, and it defines one `Group`.

A new group is a new module in this folder and nothing else: `train.diagnostics` takes its choices from the file names.
"""
