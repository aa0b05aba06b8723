"""From a checkpoint on disk or on the hub to the model's flat tuple of leaves on a mesh.

`hub` finds the directory (no jax), `checkpoint` reads safetensors headers and tensors (no jax), `mapping` joins tensors
to leaves (no jax), `packing` turns tensors into leaves, `loader` streams them. `manifest` describes a checkpoint of
leaves (no jax), `orbax_parts` saves and restores it, `convert` makes one from the other.
"""
