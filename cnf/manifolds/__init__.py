"""Manifolds on which a continuous flow may have its density: spheres, tori, and products."""

from cnf.manifolds.base import Manifold, OnManifold
from cnf.manifolds.product import Euclidean, Product
from cnf.manifolds.sphere import Sphere
from cnf.manifolds.torus import Torus

__all__ = ["Euclidean", "Manifold", "OnManifold", "Product", "Sphere", "Torus"]
