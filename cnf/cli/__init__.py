"""The command line ``cnf``: fit, score, sample, certify and plot densities of tables.

tyro generates the options from the fields of the command classes here and of
`cnf.tables.fit.DensitySettings`. `cnf.cli.main` is the entry point.
"""
