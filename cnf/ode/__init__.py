"""Ordinary differential equations: how they are solved, watched and compiled."""

from cnf.ode.solver import ErrorNorm, Gradient, ODEError, ODESolver, RightHandSide, State, methods

__all__ = ["ErrorNorm", "Gradient", "ODEError", "ODESolver", "RightHandSide", "State", "methods"]
