"""Systems of the literature, each doing what its paper is for: a module for each."""
