"""What passes stand on: facts of nodes, the contract of a rule, its driver, the editor, emission."""
