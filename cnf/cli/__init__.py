"""The command line ``cnf``: fit, score, sample, certify, plot and ablate densities of tables.

tyro generates the options from the fields of the command classes here, of
`cnf.tables.fit.DensitySettings` and of `cnf.ablation.AblationSettings`. `cnf.cli.main` is the entry
point.
"""
