"""Sphinx settings."""

project = "cnf"
copyright = "2026, the cnf developers"  # noqa: A001 - Sphinx's name
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath"]
autosummary_generate = True
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    # Which scikit-learn adds to an estimator, with links into its own documentation.
    "exclude-members": "set_fit_request, set_partial_fit_request",
}
default_role = "any"
nitpicky = False
suppress_warnings = ["ref.any", "ref.python"]  # a name may be reached by two paths
html_theme = "furo"
exclude_patterns = ["_build", "ablation_table.md"]
templates_path = ["_templates"]
