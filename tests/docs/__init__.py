"""What the documents show is true: every command in them is run, in order, at the site that its prompt names.

Owns the parser of README.md and docs/, the stages on which their commands run, and the list of exemptions.
Never touches what the documents say: a command that does not work is mended there, or in the code.
"""
