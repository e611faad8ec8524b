"""The weight grids: one definition of each serves NumPy, MLX and JAX (see `int4` and `int8`), and
`QuantizedTensor` holds weights on them. It knows nothing else of this package."""
