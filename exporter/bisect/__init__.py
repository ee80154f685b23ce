"""Finds what makes a bundle compute something else than its checkpoint says.

`search` is the way through: `stages` rebuilds the graph pass by pass, `modules` holds what is rebuilt against the
reference, `local` runs every node of the bundle on right inputs, `blame` says whether weight, graph or pass is at
fault, `write` leaves the smallest failing model behind, and `report` words it.
"""
