"""The weight grids: one definition of each serves NumPy, MLX and JAX (see `int4`, `int8` and
`sfp8`), and `tensor` holds weights on them. It knows nothing else of this package."""
