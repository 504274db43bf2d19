"""Ordinary differential equations: how they are solved, watched and compiled."""

from cnf.ode.solver import Control, Gradient, ODEError, ODESolver, RightHandSide, State, methods

__all__ = ["Control", "Gradient", "ODEError", "ODESolver", "RightHandSide", "State", "methods"]
