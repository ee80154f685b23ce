"""How fast a bundle runs on this machine, what it takes, and how far that is from what the machine can do.

`run` is the way through: `contexts` chooses at which lengths, `rounds` measures them in turn with the machine's own
`limits`, `graph_cost` counts what a step must read and compute, `shares` holds the one against the other, `profile`
says where the time goes, `report` is the result and `tables` draws it.
"""
