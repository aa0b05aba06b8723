"""Building blocks of the decoders. The only callers of `pallas_kernels` among models and layers."""
