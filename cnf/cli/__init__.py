"""The command line ``cnf``: fit, score, sample, certify and plot densities of tables.

The options are the fields of the classes in this package and of `cnf.tables.fit.DensitySettings`;
tyro makes a command line of each command. `cnf.cli.main` is the way in.
"""
