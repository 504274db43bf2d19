"""Solvers of ordinary differential equations: methods, gradients, monitoring and compilation."""

from cnf.ode.solver import ErrorNorm, Gradient, ODEError, ODESolver, RightHandSide, State, methods

__all__ = ["ErrorNorm", "Gradient", "ODEError", "ODESolver", "RightHandSide", "State", "methods"]
