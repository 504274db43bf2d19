"""Products with the Jacobian of a vector field, and its trace."""
