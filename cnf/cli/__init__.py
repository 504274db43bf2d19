"""The command line ``cnf``: fit, score, sample, certify and plot densities of tables.

The options are the fields of the classes in this package and of `cnf.density.DensitySettings`;
tyro makes a command line of each command. `cnf.cli.entry` is the way in.
"""
